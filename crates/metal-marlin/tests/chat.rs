//! `chat` and `run --chat`, fed from a pipe. What a person can do beyond that is line editing and Ctrl-C.
#![cfg(feature = "bundled-model")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const GREEDY: [&str; 4] = ["--temperature", "0", "--max-tokens", "8"];

/// Runs `metal-marlin chat` in `folder` on the lines of `script`.
fn chat(folder: &Path, options: &[&str], script: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
        .current_dir(folder)
        .arg("chat")
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A chat that has ended reads no more.
    let _ = child.stdin.take().unwrap().write_all(script.as_bytes());
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn saved(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

fn roles(messages: &Value) -> Vec<&str> {
    messages.as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect()
}

#[test]
fn each_line_is_answered_and_the_conversation_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let script = "/save empty.json\nHello\n\nWho\\\nare you?\n/save talk.json\n/system Be brief.\n/save told.json\n\
                  /reset\n/save reset.json\nHello\n/exit\nnever said\n";
    let output = chat(folder.path(), &GREEDY, script);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(saved(folder.path(), "empty.json"), json!([]));
    let talk = saved(folder.path(), "talk.json");
    assert_eq!(roles(&talk), ["user", "assistant", "user", "assistant"]);
    assert_eq!(talk[2]["content"], "Who\nare you?");
    assert_eq!(saved(folder.path(), "reset.json"), json!([{"role": "system", "content": "Be brief."}]));
    let told = saved(folder.path(), "told.json");
    assert_eq!((&told[0]["content"], told.as_array().unwrap().len()), (&"Be brief.".into(), 5));
    // Each answer ends its line; the third was given without what came before.
    let [first, second] = [1, 3].map(|index| talk[index]["content"].as_str().unwrap());
    assert!(stdout(&output).starts_with(&format!("{first}\n{second}\n")), "{}", stdout(&output));
}

#[test]
fn a_saved_conversation_goes_on_as_if_it_had_never_ended() {
    let folder = tempfile::tempdir().unwrap();
    let whole = chat(folder.path(), &GREEDY, "Hello\n/save talk.json\nWhat is the sun?\n");
    let first = chat(folder.path(), &GREEDY, "Hello\n");
    let rest = chat(folder.path(), &GREEDY, "/load talk.json\nWhat is the sun?\n");
    assert!(!rest.stdout.is_empty(), "{}", stderr(&rest));
    assert_eq!(stdout(&whole), format!("{}{}", stdout(&first), stdout(&rest)));
}

#[test]
fn one_message_is_answered_by_run() {
    let folder = tempfile::tempdir().unwrap();
    for system in [&[][..], &["--system", "Answer in verse."]] {
        let options = [system, &GREEDY].concat();
        let talked = chat(folder.path(), &options, "Tell me of the sea.\n");
        let run = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
            .args(["run", "--chat", "Tell me of the sea."])
            .args(&options)
            .output()
            .unwrap();
        assert_eq!((stdout(&run), run.status.code()), (stdout(&talked), Some(0)), "{}", stderr(&run));
    }
    let run = Command::new(env!("CARGO_BIN_EXE_metal-marlin")).args(["run", "Hi", "--system", "x"]).output().unwrap();
    assert!(run.status.code() == Some(1) && stderr(&run).contains("--chat"), "{}", stderr(&run));
}

#[test]
fn a_template_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("plain"), "{{ messages[0].content }}").unwrap();
    fs::write(folder.path().join("silent"), "{{ raise_exception('I only take orders.') }}").unwrap();
    let plain = chat(folder.path(), &[&["--chat-template", "plain"], &GREEDY[..]].concat(), "Once upon a time\n");
    let run = Command::new(env!("CARGO_BIN_EXE_metal-marlin"))
        .args(["run", "Once upon a time"])
        .args(GREEDY)
        .output()
        .unwrap();
    assert_eq!(stdout(&plain), stdout(&run), "{}", stderr(&plain));
    let refused = chat(folder.path(), &["--chat-template", "silent"], "Hello\n");
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("I only take orders. (line 1 of the template)"), "{}", stderr(&refused));
    let missing = chat(folder.path(), &["--chat-template", "nowhere"], "");
    assert!(stderr(&missing).contains("cannot read the chat template nowhere"), "{}", stderr(&missing));
}

#[test]
fn a_conversation_too_long_for_the_context_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let script = "Hello\none two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen\n";
    let output = chat(folder.path(), &["--context", "24", "--max-tokens", "4", "--temperature", "0"], script);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    for part in ["with this message the conversation has ", "the context of 24 tokens", "/reset", "--context"] {
        assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
    }
    // An answer that fills the context is cut off, and that is said.
    let output = chat(folder.path(), &["--context", "17", "--temperature", "0"], "Tell a story\n");
    assert!(output.status.success() && stderr(&output).contains("fills the context of 17"), "{}", stderr(&output));
}

#[test]
fn the_first_error_ends_a_script() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("no-talk.json"), r#"{"role": "user"}"#).unwrap();
    for (command, problem) in [
        ("/dance", "there is no command /dance"),
        ("/save", "/save FILE"),
        ("/save no/such/folder/x", "cannot write the conversation to no/such/folder/x"),
        ("/load nowhere", "cannot read nowhere"),
        ("/load no-talk.json", "no-talk.json is no saved conversation"),
        ("\"\"\"never closed", "close it"),
    ] {
        let output = chat(folder.path(), &GREEDY, &format!("{command}\n/save after.json\n"));
        assert_eq!((output.status.code(), stdout(&output)), (Some(1), ""), "{command}");
        assert!(stderr(&output).starts_with("error: ") && stderr(&output).contains(problem), "{}", stderr(&output));
        assert!(!folder.path().join("after.json").exists(), "{command}");
    }
}
