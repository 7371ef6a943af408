//! Models in several files, as `llama-gguf-split` makes them: `NAME-00001-of-00003.gguf` and so on, side by side. Each has
//! the metadata `split.no` (from 0), `split.count` and, in the whole model, `split.tensors.count`; the first one has all
//! other metadata.

use std::path::{Path, PathBuf};

use super::{DAMAGED, Gguf};
use crate::CheckpointError;

/// Digits of a number in a name.
const DIGITS: usize = 5;

/// What the name of a file says of the model it is a part of.
#[derive(PartialEq, Eq)]
struct Name<'a> {
    /// Of the model, with the folder.
    model: &'a str,
    /// From 1.
    number: u64,
    count: u64,
}

impl<'a> Name<'a> {
    fn of(path: &'a Path) -> Option<Self> {
        let (rest, count) = path.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (model, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| digits.parse().ok().filter(|_| digits.len() == DIGITS);
        Some(Self { model, number: parse(number)?, count: parse(count)? })
    }

    /// The path of another part.
    fn sibling(&self, number: u64) -> PathBuf {
        format!("{}-{number:0DIGITS$}-of-{:0DIGITS$}.gguf", self.model, self.count).into()
    }
}

/// Whether sorted files are by their names all those of one model.
pub(crate) fn are_of_one_model(files: &[PathBuf]) -> bool {
    let Some(first) = files.first().and_then(|file| Name::of(file)) else { return false };
    let count = files.len() as u64;
    first.count == count && (1..=count).zip(files).all(|(number, file)| *file == first.sibling(number))
}

/// The model that an opened file is, or is a part of.
pub(super) fn open_all(given: Gguf, path: &Path) -> Result<Gguf, CheckpointError> {
    let count = match number(&given, "split.count")? {
        None | Some(0 | 1) => return Ok(given),
        Some(count) => count,
    };
    let name = Name::of(path).filter(|name| name.count == count && (1..=count).contains(&name.number));
    let name = name.ok_or_else(|| {
        given.malformed(format!(
            "it is one of {count} files of a model, which are found by their names: they must end in -00001-of-{count:0DIGITS$}.gguf \
             and so on"
        ))
    })?;
    let hint = format!("all {count} files of the model must lie side by side");
    let mut whole: Option<Gguf> = None;
    for part in 1..=count {
        let file = Gguf::open_file(&name.sibling(part), &hint)?;
        for (key, wanted) in [("split.no", part - 1), ("split.count", count)] {
            let found = number(&file, key)?;
            if found != Some(wanted) {
                let found = found.map_or("missing".to_owned(), |found| found.to_string());
                return Err(file.malformed(format!(
                    "metadata `{key}` is {found}, by its name it must be {wanted}; download the files of the model again"
                )));
            }
        }
        match &mut whole {
            None => whole = Some(file),
            Some(whole) => whole.append(file)?,
        }
    }
    let whole = whole.unwrap_or(given);
    let tensors = whole.tensors().len() as u64;
    match number(&whole, "split.tensors.count")? {
        Some(wanted) if wanted != tensors => {
            Err(whole.malformed(format!("its {count} files hold {tensors} tensors, wanted {wanted}; {DAMAGED}")))
        }
        _ => Ok(whole),
    }
}

/// A number of the metadata; `None` if there is no such key.
fn number(gguf: &Gguf, key: &str) -> Result<Option<u64>, CheckpointError> {
    let Some(value) = gguf.value(key) else { return Ok(None) };
    let number = value.as_u64();
    number
        .map(Some)
        .ok_or_else(|| gguf.malformed(format!("metadata `{key}` is {value:?}, wanted a whole number; {DAMAGED}")))
}

impl Gguf {
    /// Takes the tensors of the next file of the model.
    fn append(&mut self, next: Self) -> Result<(), CheckpointError> {
        for mut tensor in next.header.tensors {
            tensor.file = self.files.len();
            if self.header.index.insert(tensor.name.clone(), self.header.tensors.len()).is_some() {
                let problem = format!("tensor `{}` is in an earlier file of the model as well; {DAMAGED}", tensor.name);
                return Err(CheckpointError::malformed(&next.files[0].label, problem));
            }
            self.header.tensors.push(tensor);
        }
        self.files.extend(next.files);
        Ok(())
    }
}
