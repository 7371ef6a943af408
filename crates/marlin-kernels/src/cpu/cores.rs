//! How many threads are fastest.

use std::thread::available_parallelism;

use super::threads::MOST_THREADS;

/// Threads that kernels run on if nobody says how many: one for each performance core, of those that this process may use.
///
/// A second thread on a core adds next to nothing, as both share what they wait for: its caches and its arithmetic units. An
/// efficiency core is slower than the others, which wait for it at the end of every operation.
pub fn default_threads() -> usize {
    let available = available_parallelism().map_or(1, usize::from);
    performance_cores().map_or(available, |cores| cores.min(available)).clamp(1, MOST_THREADS)
}

#[cfg(not(target_vendor = "apple"))]
use self::sysfs::performance_cores;

#[cfg(not(target_vendor = "apple"))]
mod sysfs {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;
    use std::str::FromStr;

    /// Numbers of logical processors.
    type Processors = BTreeSet<usize>;

    /// Performance cores that this process may use; `None` where there is no Linux to tell.
    pub(super) fn performance_cores() -> Option<usize> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        count(Path::new("/sys/devices"), &parse_list(allowed)?)
    }

    /// Physical cores among the fastest of the allowed processors, as a folder like `/sys/devices` describes them; `None` if it
    /// does not.
    fn count(devices: &Path, allowed: &Processors) -> Option<usize> {
        let system = devices.join("system/cpu");
        let usable = &read_list(&system.join("online"))? & allowed;
        let fast = fast_by_type(devices, &usable).or_else(|| fast_by_capacity(&system, &usable)).unwrap_or(usable);
        let siblings = |cpu: &usize| read_list(&system.join(format!("cpu{cpu}/topology/thread_siblings_list")));
        let cores: BTreeSet<Processors> = fast.iter().map(siblings).collect::<Option<_>>()?;
        (!cores.is_empty()).then_some(cores.len())
    }

    /// Those that a hybrid processor of Intel's calls cores, where it does not call them atoms; `None` of other processors.
    fn fast_by_type(devices: &Path, usable: &Processors) -> Option<Processors> {
        let fast = &read_list(&devices.join("cpu_core/cpus"))? & usable;
        (!fast.is_empty()).then_some(fast)
    }

    /// Those with more than half of the highest capacity, which Arm's hybrid processors have: little cores have a third of it or less,
    /// all others nearly as much. `None` of processors that have no capacities.
    fn fast_by_capacity(system: &Path, usable: &Processors) -> Option<Processors> {
        let capacity = |&cpu: &usize| Some((cpu, read::<u64>(&system.join(format!("cpu{cpu}/cpu_capacity")))?));
        let capacities: Vec<(usize, u64)> = usable.iter().map(capacity).collect::<Option<_>>()?;
        let most = capacities.iter().map(|(_, capacity)| *capacity).max()?;
        Some(capacities.into_iter().filter(|(_, capacity)| *capacity > most / 2).map(|(cpu, _)| cpu).collect())
    }

    fn read<T: FromStr>(file: &Path) -> Option<T> {
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    fn read_list(file: &Path) -> Option<Processors> {
        parse_list(&fs::read_to_string(file).ok()?)
    }

    /// `0-3,8,10-11`; nothing for none.
    fn parse_list(text: &str) -> Option<Processors> {
        /// More than Linux has room for.
        const MOST: usize = 1 << 16;
        let mut processors = Processors::new();
        for range in text.trim().split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let [first, last]: [usize; 2] = [first.parse().ok()?, last.parse().ok()?];
            if first > last || last >= MOST {
                return None;
            }
            processors.extend(first..=last);
        }
        Some(processors)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// A folder like `/sys/devices`.
        struct Tree(tempfile::TempDir);

        impl Tree {
            /// With these processors online, and files and what they hold.
            fn new(online: &str, files: &[(String, String)]) -> Self {
                let tree = Self(tempfile::tempdir().unwrap());
                for (file, text) in files.iter().chain([&("system/cpu/online".to_owned(), online.to_owned())]) {
                    let path = tree.0.path().join(file);
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    fs::write(path, format!("{text}\n")).unwrap();
                }
                tree
            }

            fn count(&self, allowed: &str) -> Option<usize> {
                count(self.0.path(), &parse_list(allowed).unwrap())
            }
        }

        fn siblings(cpu: usize, list: &str) -> (String, String) {
            (format!("system/cpu/cpu{cpu}/topology/thread_siblings_list"), list.to_owned())
        }

        fn capacity(cpu: usize, capacity: &str) -> (String, String) {
            (format!("system/cpu/cpu{cpu}/cpu_capacity"), capacity.to_owned())
        }

        #[test]
        fn siblings_are_one_core() {
            // As AMD counts them, and as Intel does: 0 and 4 share a core.
            let files: Vec<_> =
                (0..8).map(|cpu| siblings(cpu, &format!("{}-{}", cpu / 2 * 2, cpu / 2 * 2 + 1))).collect();
            let tree = Tree::new("0-7", &files);
            assert_eq!((tree.count("0-7"), tree.count("0-1"), tree.count("1-2")), (Some(4), Some(1), Some(2)));
            let files: Vec<_> = (0..8).map(|cpu| siblings(cpu, &format!("{},{}", cpu % 4, cpu % 4 + 4))).collect();
            let tree = Tree::new("0-7", &files);
            assert_eq!((tree.count("0-7"), tree.count("0-3"), tree.count("0,4")), (Some(4), Some(4), Some(1)));
        }

        #[test]
        fn processors_that_are_offline_do_not_count() {
            let files: Vec<_> = [0, 1, 3].map(|cpu| siblings(cpu, &cpu.to_string())).to_vec();
            assert_eq!(Tree::new("0-1,3", &files).count("0-3"), Some(3));
        }

        #[test]
        fn hybrids_of_intel_count_their_performance_cores() {
            // Two cores of two threads, four atoms of one.
            let mut files =
                vec![("cpu_core/cpus".to_owned(), "0-3".to_owned()), ("cpu_atom/cpus".to_owned(), "4-7".to_owned())];
            files.extend((0..4).map(|cpu| siblings(cpu, ["0-1", "2-3"][cpu / 2])));
            files.extend((4..8).map(|cpu| siblings(cpu, &cpu.to_string())));
            let tree = Tree::new("0-7", &files);
            assert_eq!((tree.count("0-7"), tree.count("0-1,4-7")), (Some(2), Some(1)));
            // Who may use the atoms alone, uses them.
            assert_eq!(tree.count("5-7"), Some(3));
        }

        #[test]
        fn little_cores_do_not_count() {
            let capacities = ["250", "250", "250", "250", "850", "850", "850", "1024"];
            let files: Vec<_> =
                (0..8).flat_map(|cpu| [siblings(cpu, &cpu.to_string()), capacity(cpu, capacities[cpu])]).collect();
            let tree = Tree::new("0-7", &files);
            assert_eq!((tree.count("0-7"), tree.count("0-4"), tree.count("0-3")), (Some(4), Some(1), Some(4)));
            let equal: Vec<_> =
                (0..4).flat_map(|cpu| [siblings(cpu, &cpu.to_string()), capacity(cpu, "1024")]).collect();
            assert_eq!(Tree::new("0-3", &equal).count("0-3"), Some(4));
        }

        #[test]
        fn what_cannot_be_read_is_not_counted() {
            let cpus = |lists: [&str; 2]| vec![siblings(0, lists[0]), siblings(1, lists[1])];
            assert_eq!(count(Path::new("/no/such/folder"), &parse_list("0-1").unwrap()), None);
            assert_eq!(Tree::new("0-x", &cpus(["0", "1"])).count("0-1"), None);
            assert_eq!(Tree::new("0-1", &cpus(["0", "one"])).count("0-1"), None);
            assert_eq!(Tree::new("0-2", &cpus(["0", "1"])).count("0-2"), None);
            assert_eq!(Tree::new("0-1", &cpus(["0", "1"])).count("2-3"), None);
            // Types and capacities that make no sense leave the cores.
            let mut files = cpus(["0", "1"]);
            files.extend([("cpu_core/cpus".to_owned(), "P".to_owned()), capacity(0, "1024"), capacity(1, "-")]);
            assert_eq!(Tree::new("0-1", &files).count("0-1"), Some(2));
        }

        #[test]
        fn lists_are_read_as_linux_writes_them() {
            let list = |text: &str| parse_list(text).map(|processors| processors.into_iter().collect::<Vec<_>>());
            assert_eq!(list("\t0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
            assert_eq!(list("\n"), Some(vec![]));
            for malformed in ["a", "1-", "-1", "3-1", "0-99999999999", "0-65536", "1 2"] {
                assert_eq!(list(malformed), None, "{malformed}");
            }
        }
    }
}

/// Cores of the highest performance level; all cores where there is one level.
#[cfg(target_vendor = "apple")]
fn performance_cores() -> Option<usize> {
    sysctl(c"hw.perflevel0.physicalcpu").or_else(|| sysctl(c"hw.physicalcpu"))
}

/// A positive number that the system tells.
#[cfg(target_vendor = "apple")]
fn sysctl(name: &std::ffi::CStr) -> Option<usize> {
    let (mut value, mut size) = (0i32, size_of::<i32>());
    // SAFETY: the name ends with a zero, the system writes at most `size` bytes to `value`, which has as many, and how many to
    // `size`; both live on. Nothing is set.
    let failed =
        unsafe { libc::sysctlbyname(name.as_ptr(), (&raw mut value).cast(), &raw mut size, std::ptr::null_mut(), 0) };
    (failed == 0 && size == size_of::<i32>()).then(|| usize::try_from(value).ok()).flatten().filter(|&value| value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_threads_as_may_run() {
        let available = available_parallelism().map_or(1, usize::from);
        assert!((1..=available).contains(&default_threads()));
    }
}
