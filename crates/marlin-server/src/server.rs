//! Connections, and the server's end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::registry::Models;
use crate::service::{Service, ServiceOptions};

/// Longest wait for the headers of a request, and for each further piece of its body.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait when no connection can be taken, as others may end in the meantime, and for last words.
const PAUSE: Duration = Duration::from_millis(100);

/// How a server serves.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where it listens.
    pub address: SocketAddr,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Longest time for answers under way when the server is told to end.
    pub drain: Duration,
    /// How requests are answered.
    pub service: ServiceOptions,
}

impl ServerOptions {
    /// Listens at `address`; as careful as can be otherwise.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, max_connections: 1024, drain: Duration::from_secs(30), service: ServiceOptions::default() }
    }
}

/// Why a server cannot be started, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It cannot listen there.
    #[error("cannot listen at {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// An origin that no browser can name.
    #[error("{origin:?} is no origin; one looks like https://example.org, and * stands for all")]
    Origin {
        /// What was given.
        origin: String,
    },
    /// The engine's thread cannot be started.
    #[error("cannot start a thread for the engine")]
    Thread(#[source] io::Error),
}

/// A server that listens already, and serves once it is [run](Server::run).
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    service: Service,
    max_connections: usize,
    drain: Duration,
}

impl Server {
    /// Listens, and starts to look after the models.
    ///
    /// # Errors
    /// The address cannot be had, or an option is wrong.
    pub async fn bind(models: Models, options: ServerOptions) -> Result<Self, ServerError> {
        let ServerOptions { address, max_connections, drain, service } = options;
        let listener = TcpListener::bind(address).await.map_err(|source| ServerError::Bind { address, source })?;
        let service = Service::start(models, &service)?;
        Ok(Self { listener, service, max_connections, drain })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is there; then takes nothing new, and ends when the answers under way are finished, or the time for them is
    /// over.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
        let graceful = GracefulShutdown::new();
        let permits = Arc::new(Semaphore::new(self.max_connections));
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let accept = async {
                let permit = permits.clone().acquire_owned().await;
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                () = &mut shutdown => break,
                accepted = accept => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            // Tokens are small and wanted at once. A system that cannot send them so still sends them.
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(self.service.router.clone());
            let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
            tokio::spawn(async move {
                // A client that breaks off is its own business.
                let _ = connection.await;
                drop(permit);
            });
        }
        self.service.app.is_draining.store(true, Ordering::Relaxed);
        drop(self.listener);
        tracing::info!("draining");
        let mut answered = std::pin::pin!(graceful.shutdown());
        let is_late = tokio::time::timeout(self.drain, &mut answered).await.is_err();
        if is_late {
            tracing::warn!("answers under way were given up after {} s", self.drain.as_secs());
        }
        self.service.stop().await;
        if is_late {
            // Who waited for a model is told that there will be none.
            let _ = tokio::time::timeout(PAUSE, answered).await;
        }
    }
}
