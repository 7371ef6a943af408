//! A small Hub: the API of revisions, `resolve`, and a second host that large files are redirected to.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// The files of a commit.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// Files from this size on are large ones, which the second host delivers.
const LARGE: usize = 16 * 1024;

/// A token that opens the gated model, and one that the Hub knows but that opens nothing.
pub(crate) const GOOD_TOKEN: &str = "hf_good";
pub(crate) const POOR_TOKEN: &str = "hf_poor";

/// What goes wrong with large files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The connection breaks once, after so many bytes.
    Cut(usize),
    /// Nothing comes after so many bytes, but the connection stays.
    Stall(usize),
    /// A byte is wrong.
    Flip,
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

struct State {
    /// By id and revision; a commit is a revision too.
    revisions: BTreeMap<(String, String), (String, Files)>,
    fault: Mutex<Fault>,
    log: Mutex<Vec<Request>>,
    running: AtomicBool,
    port: u16,
}

pub(crate) struct Server {
    state: Arc<State>,
}

impl Server {
    /// Serves models, given as id, branch and files. `tiny/gated` wants a token.
    pub(crate) fn start(models: &[(&str, &str, Files)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut revisions = BTreeMap::new();
        for (id, branch, files) in models {
            let commit = commit(files);
            for revision in [*branch, &commit] {
                revisions.insert(((*id).to_owned(), revision.to_owned()), (commit.clone(), files.clone()));
            }
        }
        let state = Arc::new(State {
            revisions,
            fault: Mutex::new(Fault::None),
            log: Mutex::default(),
            running: AtomicBool::new(true),
            port: listener.local_addr().unwrap().port(),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if !shared.running.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&shared);
                // A client that is killed makes an error of writing, which is nobody's fault.
                thread::spawn(move || shared.answer(&stream.unwrap()));
            }
        });
        Self { state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.state.port)
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        *self.state.fault.lock().unwrap() = fault;
    }

    /// The requests since this was last asked.
    pub(crate) fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut *self.state.log.lock().unwrap())
    }
}

impl Drop for Server {
    /// Afterwards nobody listens.
    fn drop(&mut self) {
        self.state.running.store(false, Ordering::SeqCst);
        // Wakes the listener, which then closes.
        while TcpStream::connect(("127.0.0.1", self.state.port)).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The commit of these files.
pub(crate) fn commit(files: &Files) -> String {
    let mut hash = Sha256::new();
    for (name, content) in files {
        hash.update(name);
        hash.update(content);
    }
    hex(&hash.finalize())[..40].to_owned()
}

/// The name of a file's content in the cache.
pub(crate) fn etag(content: &[u8]) -> String {
    let hash = hex(&Sha256::digest(content));
    if content.len() >= LARGE { hash } else { hash[..40].to_owned() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl State {
    fn answer(&self, mut stream: &TcpStream) {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let Some(first) = lines.next() else { return };
        let path = first.split(' ').nth(1).unwrap().to_owned();
        let header = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        let headers: BTreeMap<_, _> = lines.take_while(|line| !line.is_empty()).filter_map(header).collect();
        let request = Request { path, headers };
        self.log.lock().unwrap().push(request.clone());
        let _ = match request.path.split('/').skip(1).collect::<Vec<_>>().as_slice() {
            ["cdn", etag] => self.large(stream, etag, &request),
            ["api", "models", owner, name, "revision", revision] => {
                let revision = revision.trim_end_matches("?blobs=true").replace("%2F", "/");
                self.with_revision(stream, &format!("{owner}/{name}"), &revision, &request, |stream, commit, files| {
                    let text = listing(commit, files);
                    respond(stream, "200 OK", &[], text.as_bytes())
                })
            }
            [owner, name, "resolve", revision, file] => {
                let id = format!("{owner}/{name}");
                self.with_revision(stream, &id, revision, &request, |stream, commit, files| {
                    let Some(content) = files.get(*file) else { return not_found(stream, "EntryNotFound") };
                    if content.len() < LARGE {
                        return respond(stream, "200 OK", &[("X-Repo-Commit", commit)], content);
                    }
                    let location = format!("http://localhost:{}/cdn/{}", self.port, etag(content));
                    respond(stream, "302 Found", &[("X-Repo-Commit", commit), ("Location", &location)], b"")
                })
            }
            _ => respond(&mut stream, "400 Bad Request", &[], b""),
        };
    }

    /// Answers about a revision that the sender may see.
    fn with_revision(
        &self,
        mut stream: &TcpStream,
        id: &str,
        revision: &str,
        request: &Request,
        answer: impl Fn(&mut &TcpStream, &str, &Files) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let stream = &mut stream;
        let token = request.headers.get("authorization").map(|value| value.trim_start_matches("Bearer "));
        let is_known = self.revisions.keys().any(|(known, _)| known == id);
        match token {
            Some(token) if token != GOOD_TOKEN && token != POOR_TOKEN => {
                let message = ("X-Error-Message", "Invalid credentials in Authorization header");
                return respond(stream, "401 Unauthorized", &[message], b"");
            }
            // The real one says no more to strangers, lest they learn which private models exist.
            None if !is_known => return respond(stream, "401 Unauthorized", &[("X-Error-Code", "RepoNotFound")], b""),
            Some(_) if !is_known => return not_found(stream, "RepoNotFound"),
            // Everyone may know which files a gated model has.
            _ if id != "tiny/gated" || token == Some(GOOD_TOKEN) || request.path.starts_with("/api/") => {}
            None => return respond(stream, "401 Unauthorized", &[("X-Error-Code", "GatedRepo")], b""),
            Some(_) => return respond(stream, "403 Forbidden", &[("X-Error-Code", "GatedRepo")], b""),
        }
        match self.revisions.get(&(id.to_owned(), revision.to_owned())) {
            Some((commit, files)) => answer(stream, commit, files),
            None => not_found(stream, "RevisionNotFound"),
        }
    }

    fn large(&self, mut stream: &TcpStream, wanted: &str, request: &Request) -> std::io::Result<()> {
        let mut contents = self.revisions.values().flat_map(|(_, files)| files.values());
        let Some(content) = contents.find(|content| etag(content) == wanted) else {
            return not_found(&mut stream, "EntryNotFound");
        };
        let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let start: usize = range.map_or(0, |start| start.parse().unwrap());
        let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
        let mut rest = content[start..].to_vec();
        let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
        let headers = format!("HTTP/1.1 {status}\r\nContent-Range: {range}\r\nContent-Length: {}\r\n\r\n", rest.len());
        stream.write_all(headers.as_bytes())?;
        let fault = *self.fault.lock().unwrap();
        match fault {
            Fault::None => stream.write_all(&rest),
            Fault::Flip => {
                rest[0] ^= 1;
                stream.write_all(&rest)
            }
            Fault::Cut(after) => {
                *self.fault.lock().unwrap() = Fault::None;
                stream.write_all(&rest[..after])
            }
            Fault::Stall(after) => {
                stream.write_all(&rest[..after])?;
                while *self.fault.lock().unwrap() == fault && self.running.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            }
        }
    }
}

/// What the API says about a revision with `blobs=true`.
fn listing(commit: &str, files: &Files) -> String {
    let sibling = |(name, content): (&String, &Vec<u8>)| {
        let mut sibling = json!({ "rfilename": name, "size": content.len(), "blobId": "0".repeat(40) });
        if content.len() >= LARGE {
            sibling["lfs"] = json!({ "sha256": etag(content), "size": content.len(), "pointerSize": 134 });
        } else {
            sibling["blobId"] = etag(content).into();
        }
        sibling
    };
    json!({ "id": "tiny/model", "sha": commit, "siblings": files.iter().map(sibling).collect::<Vec<_>>() }).to_string()
}

fn not_found(stream: &mut &TcpStream, code: &str) -> std::io::Result<()> {
    respond(stream, "404 Not Found", &[("X-Error-Code", code)], b"")
}

fn respond(stream: &mut &TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(body)
}
