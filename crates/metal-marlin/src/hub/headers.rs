//! A model without the values of its weights: all that is needed to plan its memory, and little to fetch.

use std::fs::{self, File};
use std::io::Write;

use marlin_checkpoint::{CONFIG_FILE, INDEX_FILE};
use serde_json::Value;
use tempfile::TempDir;

use super::client::{Client, Listing};
use super::{DEFAULT_REVISION, Fetch, Hub, HubError, HubId, Progress};

impl Hub {
    /// A temporary folder with the model's small files and weight files of full length, whose headers are those of the model and whose values
    /// are holes that read as zeros. `None` for a model that is packed: its shapes are among the values, so that it has to
    /// be fetched whole.
    ///
    /// # Errors
    /// As for [`Hub::snapshot`].
    pub fn headers(
        &self,
        id: &HubId,
        revision: Option<&str>,
        progress: &mut Progress<'_>,
    ) -> Result<Option<TempDir>, HubError> {
        let client = Client::new(&self.endpoint, self.token.as_deref(), id);
        let Listing { commit, files } = self.list(&client, id, revision.unwrap_or(DEFAULT_REVISION))?;
        let repo = self.cache.repo(id);
        let mut fetch = Fetch { client, repo: &repo, commit: &commit, files: &files, done: 0, total: 0, progress };
        let small = fetch.small_files()?;
        let weights = fetch.weights()?;
        fetch.files(&small)?;
        let snapshot = repo.snapshot(&commit);
        let path = snapshot.join(CONFIG_FILE);
        let config = fs::read(&path).map_err(HubError::io("read", &path))?;
        // A config that cannot be read is reported when the model is opened.
        if serde_json::from_slice(&config).is_ok_and(|config: Value| config.get("quantization_config").is_some()) {
            return Ok(None);
        }

        let folder = tempfile::tempdir().map_err(HubError::io("make a temporary folder in", &std::env::temp_dir()))?;
        let index = [INDEX_FILE].into_iter().filter(|index| snapshot.join(index).is_file());
        for name in small.iter().map(|file| file.name.as_str()).chain(index) {
            let path = folder.path().join(name);
            fs::copy(snapshot.join(name), &path).map_err(HubError::io("write", &path))?;
        }
        for file in weights {
            let header = fetch.client.header(&commit, file)?;
            let path = folder.path().join(&file.name);
            let written = File::create(&path).and_then(|mut hollow| {
                hollow.write_all(&header)?;
                hollow.set_len(file.size)
            });
            written.map_err(HubError::io("write", &path))?;
        }
        Ok(Some(folder))
    }
}
