//! What is asked of the Hub: the files of a revision, and their contents.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, RANGE};
use ureq::{Agent, Body};

use super::{HubError, HubId, id};

/// What stays as it is in a part of an address.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Attempts in a row that bring nothing before a download is given up.
const ATTEMPTS: u32 = 5;
/// Between the first and the second of them; each further wait is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A server silent for so long is not coming back.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest header that the safetensors format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// A file in a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) size: u64,
    /// The name of its content in the cache: the SHA-256 of a large file, git's hash of a small one.
    pub(super) etag: String,
    is_sha256: bool,
}

/// The files of a commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// The Hub's answer about a revision.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
    size: u64,
}

/// Why an attempt brought no more.
enum Interrupted {
    /// Another attempt may do better.
    Broken(Box<dyn std::error::Error + Send + Sync>),
    Failed(HubError),
}

/// Talks with the Hub about one model.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    token: Option<&'a str>,
    id: &'a HubId,
}

impl<'a> Client<'a> {
    pub(super) fn new(endpoint: &'a str, token: Option<&'a str>, id: &'a HubId) -> Self {
        // The token goes to the Hub only, not to the hosts that it redirects to.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .user_agent(concat!("metal-marlin/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.new_agent(), endpoint, token, id }
    }

    /// The files of a revision. `missing` is said of the cache if the Hub does not answer.
    pub(super) fn list(&self, revision: &str, missing: &str) -> Result<Listing, HubError> {
        let endpoint = self.endpoint;
        let encoded = utf8_percent_encode(revision, PLAIN);
        let url = format!("{endpoint}/api/models/{}/revision/{encoded}?blobs=true", self.id);
        let unreachable = |source: ureq::Error| HubError::Unreachable {
            id: self.id.to_string(),
            endpoint: endpoint.to_owned(),
            missing: missing.to_owned(),
            source: Box::new(source),
        };
        let mut response = self.get(&url, 0).map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(self.refusal(&url, revision, &response));
        }
        let answer = |problem: String| HubError::Answer { url: url.clone(), problem };
        let text = response.body_mut().read_to_string().map_err(unreachable)?;
        let info: RepoInfo = serde_json::from_str(&text).map_err(|e| answer(e.to_string()))?;
        if !id::is_commit(&info.sha) {
            return Err(answer(format!("`{}` is no commit", info.sha)));
        }
        let files = info.siblings.into_iter().map(RemoteFile::new).collect::<Result<_, _>>().map_err(answer)?;
        Ok(Listing { commit: info.sha, files })
    }

    /// Fetches a file to `blob` by way of `blob.incomplete`, going on after what is there of it. `progress` is told the bytes
    /// that are here.
    pub(super) fn fetch(
        &self,
        commit: &str,
        file: &RemoteFile,
        blob: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), HubError> {
        let url = self.url(commit, file);
        let path = blob.with_extension("incomplete");
        let mut part = Part::open(&path, file).map_err(HubError::io("write", &path))?;
        let (mut idle, mut furthest) = (0, part.len);
        while part.len < file.size {
            match self.receive(&url, commit, file, &mut part, &path, progress) {
                Ok(()) => {}
                Err(Interrupted::Failed(error)) => return Err(error),
                Err(Interrupted::Broken(source)) => {
                    // A server that breaks and then refuses to go on gets no further, however much it sends.
                    idle = if part.len > furthest { 0 } else { idle + 1 };
                    furthest = furthest.max(part.len);
                    if idle == ATTEMPTS {
                        return Err(HubError::Broken { file: url, done: part.len, size: file.size, source });
                    }
                    thread::sleep(FIRST_WAIT * 2u32.pow(idle));
                }
            }
        }
        let found = part.finish(&path)?;
        if file.is_sha256 && found != file.etag {
            std::fs::remove_file(&path).map_err(HubError::io("remove", &path))?;
            return Err(HubError::Damaged { file: url, found, wanted: file.etag.clone() });
        }
        std::fs::rename(&path, blob).map_err(HubError::io("rename into place", blob))
    }

    /// The beginning of a safetensors file: the length of its header, and the header.
    pub(super) fn header(&self, commit: &str, file: &RemoteFile) -> Result<Vec<u8>, HubError> {
        let url = self.url(commit, file);
        let broken = |done: usize, source: Box<dyn std::error::Error + Send + Sync>| {
            let (file, done, size) = (url.clone(), done as u64, file.size);
            HubError::Broken { file, done, size, source }
        };
        let response = self.get(&url, 0).map_err(|e| broken(0, Box::new(e)))?;
        if !response.status().is_success() {
            return Err(self.refusal(&url, commit, &response));
        }
        // The connection is closed after what is wanted.
        let mut body = response.into_body().into_reader();
        let mut bytes = vec![0; 8];
        body.read_exact(&mut bytes).map_err(|e| broken(0, Box::new(e)))?;
        let len = u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
        if len > LONGEST_HEADER.min(file.size.saturating_sub(8)) {
            return Err(HubError::Answer { url, problem: format!("a safetensors header of {len} bytes") });
        }
        // Not allocated at once: whoever says how long it is has not sent it yet.
        let read = body.take(len).read_to_end(&mut bytes).map_err(|e| broken(8, Box::new(e)))?;
        if read as u64 != len {
            return Err(broken(bytes.len(), io::Error::from(io::ErrorKind::UnexpectedEof).into()));
        }
        Ok(bytes)
    }

    fn url(&self, commit: &str, file: &RemoteFile) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.id, utf8_percent_encode(&file.name, PLAIN))
    }

    /// Receives what follows `part`.
    fn receive(
        &self,
        url: &str,
        commit: &str,
        file: &RemoteFile,
        part: &mut Part,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Interrupted> {
        let response = self.get(url, part.len).map_err(|e| Interrupted::Broken(Box::new(e)))?;
        let write_error = |e| Interrupted::Failed(HubError::io("write", path)(e));
        match response.status().as_u16() {
            206 if starts_at(&response) == Some(part.len) => {}
            // A server that knows no ranges sends everything, and one that refuses this range is asked for everything.
            200 => part.restart().map_err(write_error)?,
            206 | 416 => {
                part.restart().map_err(write_error)?;
                return Err(Interrupted::Broken(format!("{url} refuses to go on where it stopped").into()));
            }
            429 | 500..=599 => return Err(Interrupted::Broken(Box::new(self.refusal(url, commit, &response)))),
            _ => return Err(Interrupted::Failed(self.refusal(url, commit, &response))),
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        while part.len < file.size {
            // No more than is wanted: what follows is not looked at.
            let room = usize::try_from(file.size - part.len).unwrap_or(buffer.len()).min(buffer.len());
            match body.read(&mut buffer[..room]) {
                Ok(0) => return Err(Interrupted::Broken(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
                Ok(read) => part.append(&buffer[..read]).map_err(write_error)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Interrupted::Broken(Box::new(e))),
            }
            progress(part.len);
        }
        Ok(())
    }

    /// Asks for everything from `start` on.
    fn get(&self, url: &str, start: u64) -> Result<Response<Body>, ureq::Error> {
        // Compressed, a file would not have the bytes it is said to have.
        let mut request = self.agent.get(url).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header(RANGE, format!("bytes={start}-"));
        }
        request.call()
    }

    /// What a status other than success means. The Hub answers 401 to the unknown about models it does not show to everyone,
    /// and says in a header what is the matter.
    fn refusal(&self, url: &str, revision: &str, response: &Response<Body>) -> HubError {
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let (id, endpoint, token) = (self.id.to_string(), self.endpoint.to_owned(), self.token.is_some());
        match (response.status().as_u16(), code) {
            (_, "GatedRepo") => HubError::Gated { id, endpoint, token },
            (_, "RevisionNotFound") => HubError::RevisionNotFound { id, revision: revision.to_owned(), endpoint },
            (401, _) if token && code != "RepoNotFound" => {
                let said = if message.is_empty() { "401 Unauthorized" } else { message };
                HubError::Token { endpoint, message: said.to_owned() }
            }
            (401 | 404, _) => HubError::NotFound { id, endpoint, token },
            (status, _) => {
                let message = if message.is_empty() { String::new() } else { format!(": {message}") };
                HubError::Status { url: url.to_owned(), status, message }
            }
        }
    }
}

impl RemoteFile {
    fn new(sibling: Sibling) -> Result<Self, String> {
        let Sibling { rfilename: name, size, blob_id, lfs } = sibling;
        let (size, etag, is_sha256) = match lfs {
            Some(LargeFile { sha256, size }) => (Some(size), Some(sha256), true),
            None => (size, blob_id, false),
        };
        let digits = if is_sha256 { 64 } else { 40 };
        let is_hash = |etag: &String| etag.len() == digits && etag.chars().all(|c| c.is_ascii_hexdigit());
        if name.chars().any(char::is_control) {
            return Err(format!("the file name {name:?} has control characters"));
        }
        match (size, etag.filter(is_hash)) {
            (Some(size), Some(etag)) => Ok(Self { name, size, etag, is_sha256 }),
            _ => Err(format!("`{name}` has no size or no hash")),
        }
    }
}

/// The first byte that an answer brings, by its `Content-Range: bytes START-END/SIZE`.
fn starts_at(response: &Response<Body>) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// What has arrived of a file.
struct Part {
    file: File,
    len: u64,
    /// Of large files, whose hash is known.
    hash: Option<Sha256>,
}

impl Part {
    /// Goes on after an earlier run, or begins.
    fn open(path: &Path, wanted: &RemoteFile) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut part = match file.metadata()?.len() {
            // Without a hash nobody would notice that something else lies there.
            len if wanted.is_sha256 && len <= wanted.size => {
                let mut hash = Sha256::new();
                io::copy(&mut file, &mut HashWriter(&mut hash))?;
                Self { file, len, hash: Some(hash) }
            }
            len => Self { file, len, hash: wanted.is_sha256.then(Sha256::new) },
        };
        if part.hash.is_none() || part.len > wanted.size {
            part.restart()?;
        }
        Ok(part)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        self.len = 0;
        Ok(())
    }

    /// Makes it permanent; its hash in hexadecimal, empty where none is known.
    fn finish(self, path: &Path) -> Result<String, HubError> {
        self.file.sync_all().map_err(HubError::io("write", path))?;
        Ok(self.hash.map(|hash| hex(&hash.finalize())).unwrap_or_default())
    }
}

/// Digits of a hash.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes what is written to it.
struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
