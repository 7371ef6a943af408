//! Names of models on the Hub.

use std::fmt;

/// Longest name that the Hub allows.
const LONGEST: usize = 96;

/// The name of a model on the Hub, such as `Qwen/Qwen3-4B`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId(String);

impl HubId {
    /// `owner/name` by the Hub's rules: letters, digits, `-`, `_` and `.`, which neither begin nor end with `-` or `.`;
    /// `None` for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let part = |part: &str| {
            (1..=LONGEST).contains(&part.len())
                && part.chars().all(allowed)
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let doubled = text.contains("--") || text.contains("..");
        (part(owner) && part(name) && !doubled && !name.ends_with(".git")).then(|| Self(text.to_owned()))
    }

    /// The name of its folder in the Hub's cache. `--` occurs in no id, so that no two have the same folder.
    pub(super) fn folder_name(&self) -> String {
        format!("models--{}", self.file_name())
    }

    /// The id of a folder in the Hub's cache.
    pub(super) fn of_folder(name: &str) -> Option<Self> {
        Self::of_file_name(name.strip_prefix("models--")?)
    }

    /// The id as part of a file's name.
    pub(crate) fn file_name(&self) -> String {
        self.0.replace('/', "--")
    }

    /// The id that [`HubId::file_name`] names.
    pub(crate) fn of_file_name(name: &str) -> Option<Self> {
        Self::parse(&name.replace("--", "/"))
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether this is a commit: 40 hexadecimal digits. Anything else is a branch or a tag.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

/// Whether this can be the name of a branch or tag, and a path below `refs`: what git allows, as far as it matters here.
pub(super) fn is_revision(revision: &str) -> bool {
    let parts_are_names = revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
    let forbidden = |c: char| c.is_control() || " ~^:?*[\\".contains(c);
    parts_are_names && revision.len() <= 255 && !revision.contains("..") && !revision.contains(forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_rules_of_the_hub() {
        for id in ["Qwen/Qwen3-4B", "a/b", "meta-llama/Llama-3.1-8B_x", "0/1"] {
            let parsed = HubId::parse(id).unwrap();
            assert_eq!(parsed.to_string(), id);
            assert_eq!(HubId::of_folder(&parsed.folder_name()), Some(parsed));
        }
        let long = format!("a/{}", "b".repeat(97));
        for text in
            ["gpt2", "a/b/c", "/a", "a/", "./a", "../a", "~/a", "a/b.", "a--b/c", "a/b..c", "a b/c", "a/b.git", &long]
        {
            assert_eq!(HubId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn revisions_stay_below_their_folder() {
        for revision in ["main", "refs/pr/1", "v1.0", "feature/a+b@2"] {
            assert!(is_revision(revision), "{revision}");
        }
        for revision in ["", "/main", "a//b", "../../x", "a/..", ".git", "a b", "a\nb", "a\\b"] {
            assert!(!is_revision(revision), "{revision}");
        }
        assert!(is_commit(&"0f".repeat(20)) && !is_commit("main") && !is_commit(&"0F".repeat(20)));
    }
}
