//! `qbheat encoders`

use clap::Args;
use qbheat::compute_on;
use qbheat::data::ImageSize;
use qbheat::encoder;
use qbheat::error::{Error, Result};
use serde_json::json;

use super::progress::Progress;
use super::{Answer, Common};

#[derive(Args)]
pub struct Encoders {
    /// Images that multiply-adds are counted for: a side in pixels or HEIGHTxWIDTH [default: what each was made for].
    #[arg(long)]
    image_size: Option<ImageSize>,
    /// Image pixels a position of the feature map; encoders that cannot have it are left out [default: each one's own].
    #[arg(long)]
    stride: Option<usize>,
    #[command(flatten)]
    pub common: Common,
}

impl Encoders {
    pub fn run(&self, _progress: &Progress) -> Result<Answer> {
        compute_on(self.common.device.unwrap_or_default())?;
        let mut rows = Vec::new();
        let mut lines = vec![format!(
            "{:<18}{:>11}{:>14}{:>9}{:>8}{:>7}{:>8}  source",
            "name", "parameters", "multiply-adds", "channels", "tokens", "stride", "px"
        )];
        for spec in encoder::all() {
            let stride = self.stride.unwrap_or(spec.strides[0]);
            if !spec.strides.contains(&stride) {
                continue;
            }
            let image_size = self
                .image_size
                .unwrap_or(ImageSize::square(spec.image_size));
            let counts = spec.counts(stride, image_size)?;
            lines.push(format!(
                "{:<18}{:>9.3} M{:>12.1} M{:>9}{:>8}{:>7}{:>8}  {}",
                spec.name,
                counts.parameters as f64 / 1e6,
                counts.multiply_adds as f64 / 1e6,
                counts.channels,
                match spec.tokens {
                    0 => "–".to_owned(),
                    width => width.to_string(),
                },
                stride,
                image_size.to_string(),
                spec.source,
            ));
            rows.push(json!({
                "name": spec.name,
                "parameters": counts.parameters,
                "multiply_adds": counts.multiply_adds,
                "channels": counts.channels,
                "token_width": spec.tokens,
                "stride": stride,
                "strides": spec.strides,
                "image_size": image_size,
                "source": spec.source,
            }));
        }
        if rows.is_empty() {
            return Err(Error::Value {
                key: "--stride".into(),
                value: self.stride.unwrap_or_default().to_string(),
                expected: "a stride that some encoder has: 4, 8, 16 or 32".into(),
            });
        }
        lines.push(
            "Counted without a classifier. Multiply-adds are the products of convolutions, linear layers and \
             attentions for one image."
                .into(),
        );
        Ok(Answer::done(json!({"encoders": rows}), lines.join("\n")))
    }
}
