//! Responses that are kept, to be had again and gone on from.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use marlin_engine::Message;

use super::response::ResponseObject;

/// Most bytes of text that are kept; what was kept longest is forgotten first.
const MOST_BYTES: usize = 64 << 20;

/// A response, and the conversation that it is the end of.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) response: ResponseObject,
    /// Without the instructions of any of its turns.
    pub(crate) messages: Vec<Message>,
}

/// Those that are kept: in memory, until the server ends.
#[derive(Debug, Default)]
pub(crate) struct ResponseStore(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    responses: HashMap<String, (Arc<Stored>, usize)>,
    /// In the order in which they came.
    order: VecDeque<String>,
    bytes: usize,
}

impl ResponseStore {
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, id: &str) -> Option<Arc<Stored>> {
        self.kept().responses.get(id).map(|(stored, _)| stored.clone())
    }

    /// Tells whether there was one.
    pub(crate) fn remove(&self, id: &str) -> bool {
        let mut kept = self.kept();
        kept.order.retain(|other| other != id);
        let removed = kept.responses.remove(id);
        kept.bytes -= removed.as_ref().map_or(0, |(_, bytes)| *bytes);
        removed.is_some()
    }

    pub(crate) fn insert(&self, stored: Stored) {
        let id = stored.response.id.clone();
        let of_message = |message: &Message| {
            message.content.as_ref().map_or(0, String::len)
                + serde_json::to_string(&message.fields).map_or(0, |text| text.len())
        };
        let bytes = stored.messages.iter().map(of_message).sum::<usize>()
            + serde_json::to_string(&stored.response).map_or(0, |text| text.len());
        let mut kept = self.kept();
        kept.bytes += bytes;
        kept.order.push_back(id.clone());
        kept.responses.insert(id, (Arc::new(stored), bytes));
        while kept.bytes > MOST_BYTES {
            let Some(oldest) = kept.order.pop_front() else { break };
            let forgotten = kept.responses.remove(&oldest);
            kept.bytes -= forgotten.map_or(0, |(_, bytes)| bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::responses::tests::response;

    fn stored(id: &str, bytes: usize) -> Stored {
        Stored { response: response(id), messages: vec![Message::new("user", "x".repeat(bytes))] }
    }

    #[test]
    fn what_was_kept_longest_is_forgotten_first() {
        let store = ResponseStore::default();
        for id in ["a", "b", "c"] {
            store.insert(stored(id, MOST_BYTES / 2 - 10_000));
        }
        assert!(store.get("a").is_none() && store.get("b").is_some() && store.get("c").is_some());
        assert!(store.remove("b") && !store.remove("b"));
        store.insert(stored("d", 10));
        assert!(store.get("c").is_some());
        store.insert(stored("e", 2 * MOST_BYTES));
        assert!(["c", "d", "e"].iter().all(|id| store.get(id).is_none()), "not even one that is too large");
        assert_eq!(store.kept().bytes, 0);
    }
}
