//! Models by their name on the Hugging Face Hub.
//!
//! Downloads are kept where the Hub's own tools keep them and in the same layout, so that they are shared with those. What
//! is there is used without asking anyone.

mod cache;
mod client;
mod error;
mod headers;
mod id;

use std::env;
use std::path::PathBuf;

use marlin_checkpoint::{CONFIG_FILE, INDEX_FILE, SIDE_FILES, TOKENIZER_FILE, WEIGHTS_FILE, shards_of_index};

use self::cache::Repo;
pub use self::cache::{CachedSnapshot, HubCache};
pub(crate) use self::cache::{bytes_of, entries};
pub(crate) use self::client::hex;
use self::client::{Client, Listing, RemoteFile};
pub use self::error::HubError;
pub use self::id::HubId;

/// The revision that is meant where none is named.
pub const DEFAULT_REVISION: &str = "main";

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Tells how many bytes of how many are here.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// The Hub, and the cache on this machine.
pub struct Hub {
    endpoint: String,
    cache: HubCache,
    token: Option<String>,
    offline: bool,
}

/// The files of a model as they were in one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The model.
    pub id: HubId,
    /// The commit.
    pub commit: String,
    /// Holds the files.
    pub folder: PathBuf,
}

impl Hub {
    /// As the Hub's own tools are set up: `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_TOKEN` or the token saved by
    /// logging in, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// There is no home folder.
    pub fn from_env() -> Result<Self, HubError> {
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: HubCache::from_env()?,
            token: token(),
            offline: is_set("HF_HUB_OFFLINE"),
        })
    }

    /// The cache.
    pub fn cache(&self) -> &HubCache {
        &self.cache
    }

    /// A model's files, from the cache if they are all there, otherwise fetched.
    ///
    /// # Errors
    /// It is neither here nor to be had, or cannot be kept.
    pub fn snapshot(
        &self,
        id: &HubId,
        revision: Option<&str>,
        progress: &mut Progress<'_>,
    ) -> Result<Snapshot, HubError> {
        let revision = revision.unwrap_or(DEFAULT_REVISION);
        if let Ok(snapshot) = self.cached(id, revision) {
            return Ok(snapshot);
        }
        let client = Client::new(&self.endpoint, self.token.as_deref(), id);
        let Listing { commit, files } = self.list(&client, id, revision)?;
        let repo = self.cache.repo(id);
        Fetch { client, repo: &repo, commit: &commit, files: &files, done: 0, total: 0, progress }.all()?;
        if !id::is_commit(revision) {
            repo.set_ref(revision, &commit)?;
        }
        Ok(Snapshot { id: id.clone(), folder: repo.snapshot(&commit), commit })
    }

    /// Asks for the files of a revision, unless that is forbidden.
    fn list(&self, client: &Client<'_>, id: &HubId, revision: &str) -> Result<Listing, HubError> {
        if !id::is_revision(revision) {
            return Err(HubError::Revision { revision: revision.to_owned() });
        }
        let missing = self.cached(id, revision).err().unwrap_or_default();
        if self.offline {
            let (id, revision, endpoint) = (id.to_string(), revision.to_owned(), self.endpoint.clone());
            return Err(HubError::Offline { id, revision, missing, endpoint });
        }
        client.list(revision, &missing)
    }

    /// The snapshot in the cache, or what the cache lacks of it. Nobody is asked.
    pub fn cached(&self, id: &HubId, revision: &str) -> Result<Snapshot, String> {
        if !id::is_revision(revision) {
            return Err(format!("`{revision}` is no revision"));
        }
        let repo = self.cache.repo(id);
        let unknown = || format!("{} does not know this revision", repo.folder().display());
        let commit = repo.commit(revision).ok_or_else(unknown)?;
        let folder = repo.snapshot(&commit);
        match cache::first_missing(&folder) {
            None => Ok(Snapshot { id: id.clone(), commit, folder }),
            Some(file) => Err(format!("{} has no {file}", folder.display())),
        }
    }
}

/// Fetching the files of one commit.
struct Fetch<'a, 'p> {
    client: Client<'a>,
    repo: &'a Repo,
    commit: &'a str,
    /// All files of the commit.
    files: &'a [RemoteFile],
    done: u64,
    total: u64,
    progress: &'a mut Progress<'p>,
}

impl<'a> Fetch<'a, '_> {
    /// Fetches what belongs to the model. Weights come last: a snapshot that has them has everything.
    fn all(mut self) -> Result<(), HubError> {
        let small = self.small_files()?;
        let weights = self.weights()?;
        self.files(&[small, weights].concat())
    }

    /// The files beside the weights.
    fn small_files(&self) -> Result<Vec<&'a RemoteFile>, HubError> {
        let config = self.find(CONFIG_FILE)?;
        // Before weights are fetched in vain.
        self.find(TOKENIZER_FILE)?;
        let side_files = self.files.iter().filter(|file| SIDE_FILES.contains(&file.name.as_str()));
        Ok(side_files.chain([config]).collect())
    }

    /// Which files hold the weights. Fetches their index, if there is one.
    fn weights(&mut self) -> Result<Vec<&'a RemoteFile>, HubError> {
        // As everywhere, the single file wins over an index beside it.
        if let Ok(single) = self.find(WEIGHTS_FILE) {
            return Ok(vec![single]);
        }
        let index = self.find(INDEX_FILE).map_err(|_| self.no_safetensors())?;
        self.total = index.size;
        self.file(index)?;
        let path = self.repo.snapshot(self.commit).join(INDEX_FILE);
        let index = std::fs::read(&path).map_err(HubError::io("read", &path))?;
        let shards = shards_of_index(&index, &path.display().to_string()).map_err(|e| HubError::Index(Box::new(e)))?;
        shards.iter().map(|shard| self.find(shard)).collect()
    }

    fn files(&mut self, files: &[&RemoteFile]) -> Result<(), HubError> {
        self.total = files.iter().map(|file| file.size).fold(self.total, u64::saturating_add);
        files.iter().try_for_each(|file| self.file(file))
    }

    /// One file, unless the cache has it: in this commit, or the same content from another.
    fn file(&mut self, file: &RemoteFile) -> Result<(), HubError> {
        let before = self.done;
        if !self.repo.is_linked(self.commit, &file.name) {
            let _lock = self.repo.lock(&file.etag)?;
            let blob = self.repo.blob(&file.etag);
            if std::fs::metadata(&blob).ok().map(|found| found.len()) != Some(file.size) {
                let (progress, total) = (&mut *self.progress, self.total);
                self.client.fetch(self.commit, file, &blob, &mut |here| progress(before + here, total))?;
            }
            self.repo.link(self.commit, &file.name, &file.etag)?;
        }
        self.done = before + file.size;
        (self.progress)(self.done, self.total);
        Ok(())
    }

    fn find(&self, name: &str) -> Result<&'a RemoteFile, HubError> {
        let incomplete = || HubError::Incomplete { id: self.repo.id().to_string(), file: name.to_owned() };
        self.files.iter().find(|file| file.name == name).ok_or_else(incomplete)
    }

    fn no_safetensors(&self) -> HubError {
        let is_weights = |name: &&str| {
            let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
            matches!(extension, "bin" | "gguf" | "pt" | "pth" | "safetensors")
        };
        let mut found: Vec<&str> = self.files.iter().map(|file| file.name.as_str()).filter(is_weights).collect();
        found.truncate(3);
        let found = if found.is_empty() { "files that hold no weights".to_owned() } else { found.join(", ") };
        HubError::NoSafetensors { id: self.repo.id().to_string(), found }
    }
}

/// An environment variable that says something.
fn text(variable: &str) -> Option<String> {
    env::var(variable).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// As the Hub's tools read switches.
fn is_set(variable: &str) -> bool {
    text(variable).is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

/// `HF_TOKEN`, or what logging in has saved.
fn token() -> Option<String> {
    if let Some(token) = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")) {
        return Some(token);
    }
    let path = text("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(cache::hf_home()?.join("token")))?;
    let saved = std::fs::read_to_string(path).ok()?;
    Some(saved.trim().to_owned()).filter(|token| !token.is_empty())
}
