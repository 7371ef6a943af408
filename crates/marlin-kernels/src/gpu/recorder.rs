//! Records kernels and starts them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::device::{Gpu, Storage};
use super::pipeline::Pipeline;
use super::timing::Timing;
use crate::KernelError;

/// Storage buffers of a kernel, at most.
const MAX_BINDINGS: usize = 15;

/// Kernels that are started together: enough to make a submission worth while, and few enough that the device works on the first while
/// the next are recorded. On an H200, 400 kernels took 1.4 to 1.9 ms in one submission and 1.03 ms in eight.
const PIECE: usize = 50;

/// Kernels that are recorded and not yet started, and the bind groups of all that ever were: a step finds those of the step before.
pub(super) struct Recorder {
    gpu: Arc<Gpu>,
    recording: Option<Recording>,
    /// By pipeline and buffers.
    bind_groups: HashMap<(usize, [u64; MAX_BINDINGS]), wgpu::BindGroup>,
    /// While passes are timed.
    timing: Option<Timing>,
    /// Kernels recorded since the beginning.
    dispatches: u64,
}

/// The pass goes before its encoder.
struct Recording {
    pass: Option<wgpu::ComputePass<'static>>,
    commands: wgpu::CommandEncoder,
    dispatches: usize,
}

impl Recorder {
    pub(super) fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu, recording: None, bind_groups: HashMap::new(), timing: None, dispatches: 0 }
    }

    /// How many kernels were recorded since the beginning.
    pub(super) fn dispatches(&self) -> u64 {
        self.dispatches
    }

    /// Records a kernel over these buffers, in the order of its bindings.
    pub(super) fn dispatch<'a>(
        &mut self,
        pipeline: &Arc<Pipeline>,
        buffers: impl IntoIterator<Item = &'a Storage, IntoIter: Clone>,
        parameters: &[u32],
        workgroups: [usize; 3],
    ) {
        if workgroups.contains(&0) {
            return;
        }
        let buffers = buffers.into_iter();
        assert_eq!(buffers.clone().count(), pipeline.kernel.bindings.len(), "a buffer for each binding");
        let mut ids = [u64::MAX; MAX_BINDINGS];
        ids.iter_mut().zip(buffers.clone()).for_each(|(id, buffer)| *id = buffer.id);
        let bind_group = self.bind_groups.entry((Arc::as_ptr(pipeline) as usize, ids)).or_insert_with(|| {
            pipeline.note_recorded();
            let resources = buffers.map(|storage| storage.buffer.as_entire_binding());
            let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
            let entries: Vec<_> = (0..).zip(resources).map(entry).collect();
            self.gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.layout,
                entries: &entries,
            })
        });
        let recording = self.recording.get_or_insert_with(|| Recording::new(&self.gpu));
        recording.dispatches += 1;
        let is_piece = recording.dispatches == PIECE;
        self.dispatches += 1;
        self.gpu.recorded.fetch_add(1, Ordering::Relaxed);
        let pass = recording.pass_of(&self.gpu, &mut self.timing, pipeline, parameters);
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &*bind_group, &[]);
        pass.set_immediates(0, bytemuck::cast_slice(parameters));
        let [x, y, z] = workgroups.map(|count| u32::try_from(count).expect("few workgroups"));
        pass.dispatch_workgroups(x, y, z);
        if is_piece {
            self.flush();
        }
    }

    /// Starts what is recorded.
    pub(super) fn flush(&mut self) {
        if let Some(Recording { pass, commands, .. }) = self.recording.take() {
            drop(pass);
            self.gpu.queue.submit([commands.finish()]);
        }
    }

    /// Starts what is recorded, and after it a copy of the first bytes of a buffer to one that the host can read.
    pub(super) fn flush_and_copy(&mut self, from: &Storage, to: &wgpu::Buffer, bytes: u64) -> wgpu::SubmissionIndex {
        self.flush_and(|commands| commands.copy_buffer_to_buffer(&from.buffer, 0, to, 0, bytes))
    }

    /// Starts what is recorded, and after it the commands that `record` adds.
    pub(super) fn flush_and(&mut self, record: impl FnOnce(&mut wgpu::CommandEncoder)) -> wgpu::SubmissionIndex {
        let new = || self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut commands = self.recording.take().map_or_else(new, |Recording { pass, commands, .. }| {
            drop(pass);
            commands
        });
        record(&mut commands);
        self.gpu.queue.submit([commands.finish()])
    }

    /// Times the passes that are recorded until [`Recorder::stop_timing`].
    pub(super) fn start_timing(&mut self) -> Result<(), KernelError> {
        self.flush();
        self.timing = Some(Timing::new(&self.gpu)?);
        Ok(())
    }

    /// The seconds that the device took from the first timed pass's beginning to the last one's end.
    pub(super) fn stop_timing(&mut self) -> Result<f64, KernelError> {
        self.flush();
        let passes = self.timing.take().map(|timing| timing.seconds(&self.gpu)).transpose()?;
        Ok(passes.and_then(|passes| passes.last().map(|[_, end]| *end)).unwrap_or(0.0))
    }
}

impl Recording {
    fn new(gpu: &Gpu) -> Self {
        let commands = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        Self { pass: None, commands, dispatches: 0 }
    }

    /// The pass that a kernel goes into: one of its own while kernels are profiled.
    fn pass_of(
        &mut self,
        gpu: &Gpu,
        timing: &mut Option<Timing>,
        pipeline: &Pipeline,
        parameters: &[u32],
    ) -> &mut wgpu::ComputePass<'static> {
        let Self { pass, commands, .. } = self;
        let profiled = gpu.profiler.time(gpu, &pipeline.kernel, parameters, |writes| {
            // It ends before the next one begins.
            *pass = None;
            begin_pass(commands, Some(writes))
        });
        if profiled.is_some() {
            *pass = profiled;
        }
        pass.get_or_insert_with(|| begin_pass(commands, timing.as_mut().map(|timing| timing.next_pass(gpu))))
    }
}

fn begin_pass(
    commands: &mut wgpu::CommandEncoder,
    timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
) -> wgpu::ComputePass<'static> {
    commands.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes }).forget_lifetime()
}
