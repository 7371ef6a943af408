//! Options that choose tokens.

use marlin_checkpoint::GenerationConfig;
use marlin_engine::SamplingParams;

/// How to choose tokens; what is not given comes from the model's generation_config.json.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Randomness: 0 always takes the most likely token, 1 samples the model's own distribution
    #[arg(long, short, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,

    /// Choose among this many of the most likely tokens; 0 for all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,

    /// Choose among the fewest most likely tokens that together have this probability; 1 for all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,

    /// Drop tokens less likely than this share of the most likely one; 0 for none
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,

    /// Make tokens that have occurred, prompt included, less likely by this factor; 1 for none
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,

    /// Make tokens already generated less likely by this much, once; between -2 and 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub presence_penalty: Option<f64>,

    /// Make tokens already generated less likely by this much for each occurrence; between -2 and 2
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f64>,

    /// The same seed gives the same text [default: another one each time]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl SamplingOptions {
    /// These options over the model's, over the built-in ones.
    pub fn params(&self, generation: &GenerationConfig) -> SamplingParams {
        let base = SamplingParams::from_generation_config(generation);
        let temperature = self.temperature.unwrap_or(base.temperature);
        // The built-in penalty is there to keep sampling lively; who asks for the most likely token gets just that.
        let built_in_penalty = if temperature == 0.0 { 1.0 } else { base.repetition_penalty };
        SamplingParams {
            temperature,
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.or(generation.repetition_penalty).unwrap_or(built_in_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            seed: self.seed,
            ..base
        }
    }
}
