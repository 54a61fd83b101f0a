//! Height and width of what a network sees.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::decode;

/// As of the images themselves.
const MAX_SIDE: usize = decode::MAX_SIDE as usize;

/// Height and width in pixels; in TOML and JSON one number where they are the same, else `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub struct ImageSize {
    /// Rows.
    pub height: usize,
    /// Pixels a row.
    pub width: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "a whole number of pixels, or [height, width]")]
enum Form {
    Square(usize),
    Sides([usize; 2]),
}

impl ImageSize {
    /// As many rows as pixels a row.
    pub fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }

    /// Rows times pixels a row.
    pub fn pixels(self) -> usize {
        self.height * self.width
    }

    /// The smaller of the two.
    pub fn shorter(self) -> usize {
        self.height.min(self.width)
    }

    /// As a value of a TOML key.
    pub fn to_toml(self) -> String {
        match self.into() {
            Form::Square(side) => side.to_string(),
            Form::Sides([height, width]) => format!("[{height}, {width}]"),
        }
    }
}

impl TryFrom<Form> for ImageSize {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        let (height, width) = match form {
            Form::Square(side) => (side, side),
            Form::Sides([height, width]) => (height, width),
        };
        let sides = 1..=MAX_SIDE;
        if sides.contains(&height) && sides.contains(&width) {
            Ok(Self { height, width })
        } else {
            Err(format!("sides from 1 to {MAX_SIDE} pixels"))
        }
    }
}

impl From<ImageSize> for Form {
    fn from(size: ImageSize) -> Self {
        if size.height == size.width {
            Self::Square(size.height)
        } else {
            Self::Sides([size.height, size.width])
        }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match Form::from(*self) {
            Form::Square(side) => write!(f, "{side}"),
            Form::Sides([height, width]) => write!(f, "{height}x{width}"),
        }
    }
}

impl FromStr for ImageSize {
    type Err = String;

    /// Reads `64`, or `96x64`: height, then width.
    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| {
            text.trim().parse().map_err(|_| {
                "expected a side in pixels such as 64, or HEIGHTxWIDTH such as 96x64".to_owned()
            })
        };
        let form = match text.split_once('x') {
            Some((height, width)) => Form::Sides([side(height)?, side(width)?]),
            None => Form::Square(side(text)?),
        };
        form.try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_is_a_square_and_two_are_height_and_width() {
        let wide: ImageSize = "32x96".parse().unwrap();
        assert_eq!((wide.height, wide.width), (32, 96));
        assert_eq!(
            (wide.to_string(), wide.to_toml()),
            ("32x96".into(), "[32, 96]".into())
        );
        let square: ImageSize = "64".parse().unwrap();
        assert_eq!(square, ImageSize::square(64));
        assert_eq!(square.to_toml(), "64");
        for bad in ["", "0", "64x", "x64", "64x0", "-64", "64x64x3", "20001"] {
            assert!(bad.parse::<ImageSize>().is_err(), "{bad}");
        }
        for bad in ["0", "[0, 64]", "[64, 0]", "5000000000"] {
            assert!(serde_json::from_str::<ImageSize>(bad).is_err(), "{bad}");
        }
        for size in [wide, square] {
            let json = serde_json::to_string(&size).unwrap();
            assert_eq!(serde_json::from_str::<ImageSize>(&json).unwrap(), size);
        }
    }
}
