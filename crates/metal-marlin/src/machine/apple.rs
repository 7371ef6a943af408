//! Apple's chips: how fast their memory is read, and how fast a model should therefore decode on their GPUs.

/// A chip of Apple silicon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AppleChip {
    /// As the chip's GPU calls itself.
    pub name: &'static str,
    /// Bytes a second of its memory, in 10⁹, with the fewest and with the most cores of a GPU that it is sold with.
    pub bandwidth: [f64; 2],
}

/// The bandwidths of Apple's technical specifications.
const CHIPS: [AppleChip; 16] = [
    chip("Apple M1", 68.25, 68.25),
    chip("Apple M1 Pro", 200.0, 200.0),
    chip("Apple M1 Max", 400.0, 400.0),
    chip("Apple M1 Ultra", 800.0, 800.0),
    chip("Apple M2", 100.0, 100.0),
    chip("Apple M2 Pro", 200.0, 200.0),
    chip("Apple M2 Max", 400.0, 400.0),
    chip("Apple M2 Ultra", 800.0, 800.0),
    chip("Apple M3", 100.0, 100.0),
    chip("Apple M3 Pro", 150.0, 150.0),
    chip("Apple M3 Max", 300.0, 400.0),
    chip("Apple M3 Ultra", 819.0, 819.0),
    chip("Apple M4", 120.0, 120.0),
    chip("Apple M4 Pro", 273.0, 273.0),
    chip("Apple M4 Max", 410.0, 546.0),
    chip("Apple M5", 153.0, 153.0),
];

const fn chip(name: &'static str, fewest_cores: f64, most_cores: f64) -> AppleChip {
    AppleChip { name, bandwidth: [fewest_cores, most_cores] }
}

/// The share of the memory's bandwidth that kernels reach. An assumption: the one that programs with kernels made for these GPUs come
/// near to on the smaller chips.
const SHARE_OF_BANDWIDTH: f64 = 0.85;
/// Seconds that a kernel costs which waits for the one before. An assumption, too.
const DISPATCH_SECONDS: f64 = 5e-6;

impl AppleChip {
    /// All that are known, the oldest first.
    pub fn all() -> &'static [Self] {
        &CHIPS
    }

    /// The chip of a GPU of this name.
    pub fn of_gpu(name: &str) -> Option<Self> {
        CHIPS.into_iter().find(|chip| chip.name == name)
    }

    /// Tokens a second that decoding should reach with the fewest and with the most cores, where a token reads so many bytes and runs
    /// so many kernels one after the other: what the memory and the start of kernels allow.
    pub fn tokens_per_second(&self, bytes: f64, kernels: f64) -> [f64; 2] {
        self.bandwidth.map(|rate| 1.0 / (bytes / (rate * 1e9 * SHARE_OF_BANDWIDTH) + kernels * DISPATCH_SECONDS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_found_by_the_whole_name() {
        assert_eq!(AppleChip::of_gpu("Apple M4 Max").map(|chip| chip.bandwidth), Some([410.0, 546.0]));
        assert_eq!(AppleChip::of_gpu("Apple M4").map(|chip| chip.bandwidth), Some([120.0, 120.0]));
        assert_eq!(AppleChip::of_gpu("NVIDIA H200"), None);
    }

    #[test]
    fn a_token_takes_the_time_of_its_bytes_and_its_kernels() {
        let chip = chip("chip", 100.0, 200.0);
        // 1 GB at 85 GB/s and at 170 GB/s.
        let without_kernels = chip.tokens_per_second(1e9, 0.0);
        assert!((without_kernels[0] - 85.0).abs() < 1e-9 && (without_kernels[1] - 170.0).abs() < 1e-9);
        let [slow, fast] = chip.tokens_per_second(1e9, 200.0).map(|rate| 1.0 / rate);
        assert!((slow - (1.0 / 85.0 + 1e-3)).abs() < 1e-9 && (fast - (1.0 / 170.0 + 1e-3)).abs() < 1e-9);
    }

    /// Its table is that of Qwen3-4B in FP4 with an INT8 embedding, 7 kernels a layer and 4 more.
    #[test]
    fn the_page_for_macs_has_these_predictions() {
        let page = include_str!("../../../../docs/macos.md");
        let layer = 2560.0 * (2.0 * 4096.0 + 2.0 * 1024.0 + 3.0 * 9728.0);
        let bytes = (36.0 * layer * 4.125 + 151_936.0 * 2560.0 * 8.5) / 8.0;
        let kernels = 36.0 * 7.0 + 4.0;
        assert!(page.contains(&format!("{:.0} MB a token in {kernels} kernels", bytes / 1e6)));
        let range = |[least, most]: [String; 2]| if least == most { least } else { format!("{least} to {most}") };
        for chip in AppleChip::all() {
            let rates = range(chip.bandwidth.map(|rate| rate.to_string()));
            let speeds = range(chip.tokens_per_second(bytes, kernels).map(|rate| format!("{rate:.1}")));
            let line = format!("| {} | {rates} | {speeds} |", chip.name);
            assert!(page.lines().any(|found| found == line), "no line {line}");
        }
    }
}
