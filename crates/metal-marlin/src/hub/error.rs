//! What can go wrong between here and the Hub.

use std::io;
use std::path::{Path, PathBuf};

use marlin_checkpoint::CheckpointError;

/// Why a model cannot be had from the Hub or its cache.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Nowhere to keep models.
    #[error("there is no place for downloaded models: set HF_HOME or HOME to a folder")]
    NoHome,
    /// A revision that cannot be the name of one.
    #[error("`{revision}` is no revision; wanted a branch, a tag or a commit of 40 hexadecimal digits")]
    Revision {
        /// What was given.
        revision: String,
    },
    /// Nothing may be asked, and it is not here.
    #[error(
        "{id} at revision {revision} is not in the cache: {missing}; {endpoint} is not asked because HF_HUB_OFFLINE is \
         set: unset it, or name the folder of a model"
    )]
    Offline {
        /// The model.
        id: String,
        /// Branch, tag or commit.
        revision: String,
        /// What the cache lacks.
        missing: String,
        /// The Hub.
        endpoint: String,
    },
    /// The Hub does not answer.
    #[error(
        "cannot fetch {id}: {endpoint} cannot be reached, and the cache does not have it: {missing}; go online, set \
         HF_ENDPOINT to a mirror, or name the folder of a model"
    )]
    Unreachable {
        /// The model.
        id: String,
        /// The Hub.
        endpoint: String,
        /// What the cache lacks.
        missing: String,
        /// What happened.
        source: Box<ureq::Error>,
    },
    /// A model whose terms have to be accepted.
    #[error("{id} is gated: accept its terms at {endpoint}/{id} and {}", advice(*.token))]
    Gated {
        /// The model.
        id: String,
        /// The Hub.
        endpoint: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The Hub refused the token.
    #[error(
        "{endpoint} refuses the token: {message}; get one at {endpoint}/settings/tokens and set HF_TOKEN to it, or unset \
         HF_TOKEN for what is public"
    )]
    Token {
        /// The Hub.
        endpoint: String,
        /// What it said.
        message: String,
    },
    /// There is no such model, or it is not shown to us.
    #[error("there is no model {id} at {endpoint}, nor a folder {id} here; if it is private, {}", advice(*.token))]
    NotFound {
        /// The model.
        id: String,
        /// The Hub.
        endpoint: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// There is no such branch, tag or commit.
    #[error("{id} has no revision {revision}; its branches and tags are at {endpoint}/{id}/tree/main")]
    RevisionNotFound {
        /// The model.
        id: String,
        /// What was asked for.
        revision: String,
        /// The Hub.
        endpoint: String,
    },
    /// Another answer than the one wanted.
    #[error("{url} answers {status}{message}")]
    Status {
        /// What was asked.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What the server said beside it, after a separator.
        message: String,
    },
    /// An answer that makes no sense.
    #[error("{url} answers what the Hub would not: {problem}; is HF_ENDPOINT a Hub?")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// A repository without the weights that are read here.
    #[error(
        "{id} has neither model.safetensors nor its index, only {found}; choose a repository that has the model in \
         safetensors format, or download one *.gguf file and give its path"
    )]
    NoSafetensors {
        /// The model.
        id: String,
        /// What it has instead.
        found: String,
    },
    /// A repository that lacks a file every model has.
    #[error("{id} has no {file}: it holds no whole model")]
    Incomplete {
        /// The model.
        id: String,
        /// What is missing.
        file: String,
    },
    /// The list of weight files.
    #[error(transparent)]
    Index(Box<CheckpointError>),
    /// The connection broke too often.
    #[error(
        "cannot fetch {file}: the connection broke after {done} of {size} bytes; the same command goes on from there"
    )]
    Broken {
        /// The file's address.
        file: String,
        /// What is here.
        done: u64,
        /// What is wanted.
        size: u64,
        /// What happened at last.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file whose content is not what the Hub says it is.
    #[error(
        "{file} arrived damaged: its SHA-256 is {found}, the Hub names {wanted}; it is removed, run the command again"
    )]
    Damaged {
        /// The file's address.
        file: String,
        /// Of what arrived.
        found: String,
        /// Of what was wanted.
        wanted: String,
    },
    /// The cache cannot be used.
    #[error("cannot {action} {path}", path = .path.display())]
    Io {
        /// What failed.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn advice(token: bool) -> &'static str {
    if token {
        "check that the account of HF_TOKEN may see it"
    } else {
        "set HF_TOKEN to a token of an account that may see it (or log in with `hf auth login`)"
    }
}

impl HubError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
