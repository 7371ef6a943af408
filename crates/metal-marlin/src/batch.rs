//! Batches: files of requests, a line each in OpenAI's format, and files of their answers.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// What a request may be sent to.
const URLS: [&str; 5] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/perplexity"];

/// Why a batch cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A file cannot be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line is not what it should be.
    #[error("{path}, line {line}: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process writes the answers.
    #[error("{path} is being written by another process; wait for it, or name another file")]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchRequest {
    /// By which its answer is known.
    pub custom_id: String,
    /// Where it goes: the path of an endpoint.
    pub url: String,
    /// What is sent there.
    pub body: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestLine {
    custom_id: String,
    method: String,
    url: String,
    body: Map<String, Value>,
}

/// Reads a file of requests. Empty lines are none.
///
/// # Errors
/// It cannot be read, a line is no request, or two have one name: nothing is sent before all are known to make sense.
pub fn read_requests(path: &Path) -> Result<Vec<BatchRequest>, BatchError> {
    let of_file = |source| BatchError::File { path: path.to_owned(), source };
    let mut requests = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for (line, text) in (1..).zip(BufReader::new(File::open(path).map_err(of_file)?).lines()) {
        let text = text.map_err(of_file)?;
        if text.trim().is_empty() {
            continue;
        }
        let wrong = |problem: String| BatchError::Line { path: path.to_owned(), line, problem };
        let request = parse(&text).map_err(wrong)?;
        if let Some(other) = known.insert(request.custom_id.clone(), line) {
            return Err(wrong(format!("the custom_id {:?} is that of line {other}, too", request.custom_id)));
        }
        requests.push(request);
    }
    Ok(requests)
}

fn parse(text: &str) -> Result<BatchRequest, String> {
    let wanted = r#"a line is {"custom_id": "…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}"#;
    let RequestLine { custom_id, method, url, body } =
        serde_json::from_str(text).map_err(|error| format!("{error}; {wanted}"))?;
    if method != "POST" {
        return Err(format!("the method must be POST, found {method:?}"));
    }
    if !URLS.contains(&url.as_str()) {
        return Err(format!("the url must be one of {}, found {url:?}", URLS.join(", ")));
    }
    if body.get("stream").is_some_and(|stream| *stream != false) {
        return Err("answers of a batch are not streamed: leave stream out".to_owned());
    }
    Ok(BatchRequest { custom_id, url, body })
}

/// An answer.
#[derive(Serialize)]
struct AnswerLine<'a> {
    id: String,
    custom_id: &'a str,
    response: AnswerBody<'a>,
    /// Always `null`: what is wrong is in the body.
    error: Option<String>,
}

#[derive(Serialize)]
struct AnswerBody<'a> {
    status_code: u16,
    request_id: String,
    body: &'a RawValue,
}

/// What is read of a line that was written before.
#[derive(Deserialize)]
struct KnownAnswer {
    custom_id: String,
    response: KnownBody,
}

#[derive(Deserialize)]
struct KnownBody {
    status_code: u16,
}

/// A file of answers that grows. Each is there as a whole or not at all, whatever ends the process: half a line at the end is cut off when the
/// file is opened again.
#[derive(Debug)]
pub struct BatchAnswers {
    path: PathBuf,
    file: File,
    done: HashSet<String>,
    refused: usize,
}

impl BatchAnswers {
    /// Opens or makes the file.
    ///
    /// # Errors
    /// It cannot be read or written, holds something else, or answers to requests that are not among these.
    pub fn open(path: &Path, requests: &[BatchRequest]) -> Result<Self, BatchError> {
        let of_file = |source| BatchError::File { path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(of_file)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => BatchError::Locked { path: path.to_owned() },
            TryLockError::Error(source) => of_file(source),
        })?;
        let asked: HashSet<&str> = requests.iter().map(|request| request.custom_id.as_str()).collect();
        let (mut done, mut refused) = (HashSet::new(), 0);
        let mut end = 0;
        let mut reader = BufReader::new(&file);
        for line in 1.. {
            let mut text = Vec::new();
            let bytes = reader.read_until(b'\n', &mut text).map_err(of_file)?;
            if bytes == 0 || text.last() != Some(&b'\n') {
                break;
            }
            let wrong = |problem: String| BatchError::Line { path: path.to_owned(), line, problem };
            let answer: KnownAnswer = serde_json::from_slice(&text)
                .map_err(|error| wrong(format!("this is no answer of a batch ({error}); name another file")))?;
            if !asked.contains(answer.custom_id.as_str()) {
                let id = answer.custom_id;
                return Err(wrong(format!(
                    "the answer to {id:?}, which is not among the requests: this file belongs to another batch; name another"
                )));
            }
            refused += usize::from(answer.response.status_code != 200);
            done.insert(answer.custom_id);
            end += bytes as u64;
        }
        drop(reader);
        file.set_len(end).map_err(of_file)?;
        file.seek(SeekFrom::Start(end)).map_err(of_file)?;
        Ok(Self { path: path.to_owned(), file, done, refused })
    }

    /// Whether a request was answered.
    pub fn has(&self, custom_id: &str) -> bool {
        self.done.contains(custom_id)
    }

    /// Requests that were answered.
    pub fn len(&self) -> usize {
        self.done.len()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty()
    }

    /// Those of them whose answer is an error.
    pub fn refused(&self) -> usize {
        self.refused
    }

    /// Appends an answer.
    ///
    /// # Errors
    /// It cannot be written, or its body is no JSON.
    pub fn write(&mut self, custom_id: &str, status: u16, body: &[u8]) -> Result<(), BatchError> {
        let of_file = |source| BatchError::File { path: self.path.clone(), source };
        let number = self.done.len();
        let line = AnswerLine {
            id: format!("batch_req_{number}"),
            custom_id,
            response: AnswerBody {
                status_code: status,
                request_id: format!("req_{number}"),
                body: serde_json::from_slice(body).map_err(|error| of_file(error.into()))?,
            },
            error: None,
        };
        let mut text = serde_json::to_vec(&line).map_err(|error| of_file(error.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(of_file)?;
        self.refused += usize::from(status != 200);
        self.done.insert(custom_id.to_owned());
        Ok(())
    }

    /// Makes sure that the answers are on the disk.
    ///
    /// # Errors
    /// The system cannot.
    pub fn finish(self) -> Result<(), BatchError> {
        self.file.sync_all().map_err(|source| BatchError::File { path: self.path, source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn line(id: &str) -> String {
        format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "/v1/completions", "body": {{"prompt": "x"}}}}"#)
    }

    fn problem(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        fs::write(&path, text).unwrap();
        read_requests(&path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_with_requests_is_said_with_the_line() {
        let good = line("a");
        assert!(problem(&format!("{good}\n\n{good}\n")).contains("line 3: the custom_id \"a\" is that of line 1"));
        assert!(problem(&format!("{good}\n{{\"custom_id\": 1}}")).contains("line 2"));
        assert!(problem(&good.replace("POST", "GET")).contains("found \"GET\""));
        assert!(problem(&good.replace("/v1/completions", "/v1/models")).contains("/v1/perplexity, found"));
        assert!(problem(&good.replace("\"prompt\"", "\"stream\": true, \"prompt\"")).contains("not streamed"));
        assert!(problem("[1]").contains("a line is {"));
    }

    #[test]
    fn answers_go_on_where_they_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let requests: Vec<BatchRequest> = ["a", "b", "c"].map(|id| parse(&line(id)).unwrap()).to_vec();
        let mut answers = BatchAnswers::open(&path, &requests).unwrap();
        answers.write("b", 200, b"{\"x\": 1.0}").unwrap();
        assert!(BatchAnswers::open(&path, &requests).unwrap_err().to_string().contains("another process"));
        answers.write("a", 404, b"{}").unwrap();
        drop(answers);
        let whole = fs::read(&path).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for end in [first, first + 1, whole.len() - 1] {
            fs::write(&path, &whole[..end]).unwrap();
            let mut answers = BatchAnswers::open(&path, &requests).unwrap();
            assert_eq!((answers.len(), answers.has("b"), answers.has("a"), answers.refused()), (1, true, false, 0));
            answers.write("a", 404, b"{}").unwrap();
            answers.finish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        let mut others = requests;
        others.remove(0);
        assert!(BatchAnswers::open(&path, &others).unwrap_err().to_string().contains("line 2: the answer to \"a\""));
        fs::write(&path, "hello\n").unwrap();
        assert!(BatchAnswers::open(&path, &others).unwrap_err().to_string().contains("no answer of a batch"));
        assert_eq!(fs::read(&path).unwrap(), b"hello\n", "what is not ours is left alone");
    }
}
