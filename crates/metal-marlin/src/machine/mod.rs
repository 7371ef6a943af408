//! What the machine is and has. Linux tells through /proc and /sys; elsewhere less is known.

mod apple;
mod bandwidth;
mod compute;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

pub use apple::AppleChip;
pub use bandwidth::BandwidthProbe;
pub use compute::ComputeProbe;

/// Main memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What programs can have without swapping.
    pub available: u64,
}

/// A cache of the first processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// 1 is nearest to the core.
    pub level: u32,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Its size.
    pub bytes: usize,
    /// Processors that share it, for example `0-7`.
    pub shared_by: String,
}

/// Physical cores; `None` where that is unknown.
pub fn cores() -> Option<usize> {
    let cpus = fs::read_dir("/sys/devices/system/cpu").ok()?.flatten();
    let id = |folder: &Path| {
        let read = |file: &str| fs::read_to_string(folder.join("topology").join(file)).ok();
        Some((read("physical_package_id")?, read("core_id")?))
    };
    let cores: BTreeSet<_> = cpus.filter_map(|entry| id(&entry.path())).collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// The processor's name; `None` where that is unknown.
pub fn processor() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    field(&info, "model name").map(str::to_owned)
}

/// Caches of the first processor, as the system lists them; none where that is unknown.
pub fn caches() -> Vec<Cache> {
    let cache = |index: usize| {
        let folder = format!("/sys/devices/system/cpu/cpu0/cache/index{index}");
        let read = |file: &str| Some(fs::read_to_string(format!("{folder}/{file}")).ok()?.trim().to_owned());
        Some(Cache {
            level: read("level")?.parse().ok()?,
            kind: read("type")?,
            bytes: parse_size(&read("size")?)?,
            shared_by: read("shared_cpu_list")?,
        })
    };
    (0..).map_while(cache).collect()
}

/// Main memory; `None` where that is unknown.
pub fn memory() -> Option<Memory> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    Some(Memory { total: kilobytes(&info, "MemTotal")?, available: kilobytes(&info, "MemAvailable")? })
}

/// The most memory this process has had at once, in bytes (Linux's VmHWM); `None` where that is unknown.
pub fn peak_memory() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// Lets [`peak_memory`] count from now on. Returns whether it does.
pub fn reset_peak_memory() -> bool {
    // proc(5): 5 resets the peak resident set size.
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Name and version of the operating system, as far as it tells.
pub fn operating_system() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name = name.map_or(std::env::consts::OS, |name| name.trim_matches('"'));
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(kernel) => format!("{name}, {} {}", std::env::consts::OS, kernel.trim()),
        Err(_) => name.to_owned(),
    }
}

/// The value in the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    };
    text.lines().find_map(value)
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `32768K`, `2M`.
fn parse_size(text: &str) -> Option<usize> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: usize = match &text[number.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_sizes_are_read_as_linux_writes_them() {
        let info = "MemTotal:       24576 kB\nMemAvailable:    1024 kB\nmodel name\t: AMD EPYC\n";
        assert_eq!(kilobytes(info, "MemTotal"), Some(24576 << 10));
        assert_eq!(kilobytes(info, "MemFree"), None);
        assert_eq!(field(info, "model name"), Some("AMD EPYC"));
        assert_eq!(
            (parse_size("32768K"), parse_size("2M"), parse_size("12")),
            (Some(32 << 20), Some(2 << 20), Some(12))
        );
        assert_eq!((parse_size("2X"), parse_size("K")), (None, None));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_about_memory() {
        let memory = memory().unwrap();
        assert!(memory.available <= memory.total && memory.total > 1 << 20);
        assert!(peak_memory().unwrap() > 1 << 12);
    }
}
