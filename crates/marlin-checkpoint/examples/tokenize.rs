//! Token ids of texts, for comparison with other programs: `tokenize FILE.gguf` takes a JSON string a line and answers
//! with a list of ids a line.

use std::error::Error;
use std::io::{self, BufRead};
use std::path::Path;

use marlin_checkpoint::Gguf;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args_os().nth(1).ok_or("give a GGUF file")?;
    let tokenizer = Gguf::open(Path::new(&file))?.tokenizer()?;
    for line in io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        println!("{:?}", tokenizer.encode(&text, true)?);
    }
    Ok(())
}
