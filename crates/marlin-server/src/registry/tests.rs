//! Models that are numbers, loaded by threads that sleep, in a memory of so many units.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::*;

/// A hang is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// What models take of a memory, and what was done.
#[derive(Debug, Default)]
struct World {
    memory: usize,
    sizes: Vec<usize>,
    used: Arc<AtomicUsize>,
    loads: AtomicUsize,
    /// Loads under way.
    at_once: AtomicUsize,
    takes: Duration,
    /// The next load of this model fails.
    broken: Mutex<HashSet<usize>>,
}

/// A model in that memory.
#[derive(Debug)]
struct Fake {
    model: usize,
    stop: Arc<Semaphore>,
}

/// Gives memory back when it is dropped.
struct Taken(Arc<AtomicUsize>, usize);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::SeqCst);
    }
}

impl Running for Fake {
    fn context(&self) -> usize {
        100 + self.model
    }

    fn stop(&self) {
        self.stop.close();
    }
}

impl World {
    fn start(&self, model: usize) -> Result<Started<Fake>, LoadFailure> {
        assert_eq!(self.at_once.fetch_add(1, Ordering::SeqCst), 0, "one load at a time");
        thread::sleep(self.takes);
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        let (size, used) = (self.sizes[model], self.used.load(Ordering::SeqCst));
        if self.broken.lock().unwrap().remove(&model) {
            return Err(LoadFailure::Broken("a hole in it".to_owned()));
        }
        if size > self.memory {
            return Err(LoadFailure::TooLarge(format!("{size} of {}", self.memory)));
        }
        if size + used > self.memory {
            return Err(LoadFailure::NoRoom(format!("{size}, {used} of {} are used", self.memory)));
        }
        self.used.fetch_add(size, Ordering::SeqCst);
        self.loads.fetch_add(1, Ordering::SeqCst);
        let stop = Arc::new(Semaphore::new(0));
        let stopped = stop.clone();
        // Ends when it is told to.
        let thread = thread::spawn(move || {
            while !stopped.is_closed() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Started { model: Fake { model, stop }, thread, kept: Box::new(Taken(self.used.clone(), size)) })
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }
}

const OPTIONS: RegistryOptions = RegistryOptions { max_waiting: 100, timeout: None, idle_unload: None };

/// A registry of models of these sizes, named by their places.
fn registry(world: World, options: RegistryOptions) -> (Registry<Fake>, Arc<World>, tokio::task::JoinHandle<()>) {
    let world = Arc::new(world);
    let names: Vec<Vec<String>> = (0..world.sizes.len()).map(|model| vec![model.to_string()]).collect();
    let metrics = Arc::new(Metrics::new(names.iter().map(|names| names[0].clone())));
    let loader = world.clone();
    let start = Arc::new(move |model: usize| loader.start(model));
    let (registry, manager) = Registry::start(names, None, start, options, metrics);
    (registry, world, manager)
}

fn world(memory: usize, sizes: &[usize]) -> World {
    World { memory, sizes: sizes.to_vec(), takes: Duration::from_millis(5), ..World::default() }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("it takes too long")
}

async fn lease(registry: &Registry<Fake>, model: usize) -> Lease<Fake> {
    let lease = within(registry.wait_for(model)).await.unwrap();
    assert_eq!(lease.model, model);
    lease
}

/// Waits until something is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}"));
}

fn statuses(registry: &Registry<Fake>) -> Vec<bool> {
    registry.entries().iter().map(|entry| matches!(entry.status(), Status::Loaded { .. })).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_loaded_once_for_all_who_ask() {
    let (registry, world, _) = registry(world(10, &[5, 5]), OPTIONS);
    assert_eq!(registry.entries()[0].status(), Status::Unloaded);
    let leases = within(futures_util::future::join_all((0..20).map(|_| lease(&registry, 0)))).await;
    assert_eq!((leases.len(), world.loads()), (20, 1));
    assert_eq!(registry.entries()[0].status(), Status::Loaded { context: 100 });
    let _other = lease(&registry, 1).await;
    drop(leases);
    drop(lease(&registry, 0).await);
    assert_eq!((world.loads(), statuses(&registry)), (2, vec![true, true]));
    let unknown = registry.lease(Some("2")).await.err().unwrap().into_body();
    assert!(serde_json::to_string(&unknown).unwrap().contains(r#"this server has 0, 1","type":"not_found_error""#));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_least_recently_used_makes_room() {
    let (registry, _, _) = registry(world(10, &[4, 4, 4, 11]), OPTIONS);
    for model in [0, 1, 0] {
        drop(lease(&registry, model).await);
    }
    drop(lease(&registry, 2).await);
    assert_eq!(statuses(&registry), [true, false, true, false]);
    // What does not fit in any case unloads nothing.
    let refusal = within(registry.wait_for(3)).await.err().unwrap();
    assert!(matches!(&refusal, Refusal::NoRoom(text) if text == "11 of 10"), "{refusal:?}");
    assert_eq!(statuses(&registry), [true, false, true, false]);
    // One in use stays, however long ago it was asked for.
    let held = lease(&registry, 0).await;
    drop(lease(&registry, 2).await);
    drop(lease(&registry, 1).await);
    assert_eq!(statuses(&registry), [true, true, false, false]);
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_finds_no_room_waits_for_a_model_in_use() {
    let (registry, world, _) = registry(world(10, &[6, 6]), OPTIONS);
    let first = lease(&registry, 0).await;
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { registry.wait_for(1).await.unwrap() }
    });
    until("a load was tried", || registry.entries()[1].status() == Status::Loading).await;
    until("there was no room", || registry.entries()[1].status() == Status::Unloaded).await;
    // Who comes later than that does not hold it up.
    let late = tokio::spawn({
        let registry = registry.clone();
        async move { registry.wait_for(0).await.unwrap() }
    });
    sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished() && !late.is_finished());
    drop(first);
    let second = within(waiting).await.unwrap();
    assert!(!late.is_finished() && statuses(&registry) == [false, true]);
    drop(second);
    drop(within(late).await.unwrap());
    assert_eq!((world.loads(), statuses(&registry)), (3, vec![true, false]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_has_its_bounds() {
    let options = RegistryOptions { max_waiting: 2, timeout: Some(Duration::from_millis(200)), idle_unload: None };
    let (registry, _, _) = registry(world(10, &[6, 6, 1]), options);
    let held = lease(&registry, 0).await;
    let refusals = within(futures_util::future::join_all((0..4).map(|_| registry.wait_for(1)))).await;
    let told = |is_meant: &dyn Fn(&Refusal) -> bool| {
        refusals.iter().filter(|refusal| is_meant(refusal.as_ref().err().unwrap())).count()
    };
    assert_eq!(told(&|refusal| matches!(refusal, Refusal::Busy { waiting: 2, most: 2 })), 2);
    let shortage = "6, 6 of 10 are used; in use are 0";
    assert_eq!(told(&|refusal| matches!(refusal, Refusal::NoRoom(text) if text == shortage)), 2, "{refusals:?}");
    // With those who waited, what was to be done for them is over.
    drop((lease(&registry, 0).await, held));
    drop(lease(&registry, 1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_costs_nothing() {
    let (registry, world, _) = registry(world(10, &[6, 6, 6]), OPTIONS);
    let held = lease(&registry, 0).await;
    for _ in 0..200 {
        assert!(timeout(Duration::from_micros(10), registry.wait_for(2)).await.is_err());
    }
    drop(held);
    drop(lease(&registry, 1).await);
    let loads = world.loads();
    assert!(loads <= 3, "{loads} loads, two of them wanted, one perhaps begun");
    drop(lease(&registry, 0).await);
    assert_eq!(world.used.load(Ordering::SeqCst), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_is_told_and_tried_again() {
    let (registry, world, _) = registry(world(10, &[6, 3]), OPTIONS);
    world.broken.lock().unwrap().insert(0);
    let (one, two, other) =
        within(async { tokio::join!(registry.wait_for(0), registry.wait_for(0), registry.wait_for(1)) }).await;
    for refusal in [one.err().unwrap(), two.err().unwrap()] {
        assert_eq!(refusal.to_string(), "the model cannot be loaded: a hole in it");
    }
    drop(other.unwrap());
    drop(lease(&registry, 0).await);
    assert_eq!(statuses(&registry), [true, true]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_while_loading_is_a_failure() {
    let metrics = Arc::new(Metrics::new(["a".to_owned()]));
    let start: Arc<Start<Fake>> = Arc::new(|_| panic!("a bug"));
    let (registry, _) = Registry::start(vec![vec!["a".to_owned()]], None, start, OPTIONS, metrics);
    let refusal = within(registry.wait_for(0)).await.err().unwrap();
    assert!(refusal.to_string().contains("a bug in the server"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_models_are_unloaded() {
    let options = RegistryOptions { idle_unload: Some(Duration::from_millis(80)), ..OPTIONS };
    let (registry, world, _) = registry(world(10, &[6, 3]), options);
    let held = lease(&registry, 0).await;
    drop(lease(&registry, 1).await);
    until("the idle one goes", || statuses(&registry) == [true, false]).await;
    sleep(Duration::from_millis(200)).await;
    assert_eq!(statuses(&registry), [true, false], "one in use is not idle");
    let returned = Instant::now();
    drop(held);
    until("nothing is kept", || world.used.load(Ordering::SeqCst) == 0).await;
    assert!(returned.elapsed() >= Duration::from_millis(80));
    drop(lease(&registry, 0).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_waits_for_nobody_in_line() {
    let (registry, world, manager) =
        registry(World { takes: Duration::from_millis(300), ..world(10, &[6, 3]) }, OPTIONS);
    let waiting = tokio::spawn({
        let registry = registry.clone();
        async move { registry.wait_for(0).await }
    });
    until("it is loaded", || registry.entries()[0].status() == Status::Loading).await;
    let stopped = Instant::now();
    registry.stop();
    assert!(matches!(within(waiting).await.unwrap(), Err(Refusal::Gone)));
    within(manager).await.unwrap();
    assert!(stopped.elapsed() < Duration::from_millis(250), "it waits for the load");
    assert!(matches!(registry.wait_for(1).await, Err(Refusal::Gone)));
    until("the load ends as well", || world.loads() == 1).await;
}

/// Many who come and go at random, in a memory for two of five: everybody gets the model asked for, and it stays while it is used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_the_model_asked_for() {
    let options = RegistryOptions { idle_unload: Some(Duration::from_millis(3)), ..OPTIONS };
    let sizes = [4, 5, 6, 3, 2];
    let (registry, world, manager) = registry(World { takes: Duration::from_millis(1), ..world(10, &sizes) }, options);
    let client = |client: u32| {
        let registry = registry.clone();
        tokio::spawn(async move {
            // Numerical Recipes' generator.
            let mut state = client;
            let mut random = move || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as usize
            };
            let mut served = 0;
            for _ in 0..60 {
                let model = random() % sizes.len();
                let patience = if random() % 4 == 0 { Duration::from_millis(2) } else { PATIENCE };
                let Ok(lease) = timeout(patience, registry.wait_for(model)).await else {
                    assert!(patience < PATIENCE, "it takes too long");
                    continue;
                };
                let lease = lease.unwrap();
                assert_eq!(lease.model, model);
                sleep(Duration::from_micros(random() as u64 % 3000)).await;
                assert!(!lease.stop.is_closed(), "a model in use is unloaded");
                served += 1;
            }
            served
        })
    };
    let clients: Vec<_> = (0..12).map(client).collect();
    let mut served = 0;
    for client in clients {
        served += timeout(6 * PATIENCE, client).await.unwrap().unwrap();
    }
    assert!(served >= 12 * 30 && world.loads() > 20, "{served} served, {} loads", world.loads());
    registry.stop();
    within(manager).await.unwrap();
    assert_eq!(world.used.load(Ordering::SeqCst), 0);
}
