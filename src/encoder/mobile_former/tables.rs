//! The family's sizes.

use super::super::{Build, Encoder, EncoderSpec};
use super::MobileFormer;
use crate::nn::Init;

/// The sizes of one Mobile-Former.
pub struct Table {
    /// Channels of the stem, a 3×3 convolution.
    pub stem: usize,
    /// Its stride.
    pub stem_stride: usize,
    /// Number and width of the tokens; the width is a multiple of 4.
    pub tokens: [usize; 2],
    /// Groups of each 1×1 convolution.
    pub groups: usize,
    /// One a block.
    pub rows: &'static [Row],
    /// Channels of a last 1×1 convolution, a map of this project's own.
    pub widen: Option<usize>,
}

/// One block: by how much it widens inside, and its output channels.
pub enum Row {
    /// Without tokens.
    Lite {
        /// Inner channels over input channels.
        expand: usize,
        /// Output channels.
        out: usize,
        /// Of the depthwise convolution.
        stride: usize,
    },
    /// Stride 2: two lite bottlenecks.
    Down {
        /// Inner channels of the first over input channels.
        expand: usize,
        /// Output channels.
        out: usize,
        /// Inner channels of the second over output channels.
        expand2: usize,
    },
    /// Stride 1.
    Flat {
        /// Inner channels over input channels.
        expand: usize,
        /// Output channels.
        out: usize,
    },
}

impl Row {
    pub(super) fn outputs(&self) -> usize {
        match *self {
            Self::Lite { out, .. } | Self::Down { out, .. } | Self::Flat { out, .. } => out,
        }
    }

    pub(super) fn stride(&self) -> usize {
        match *self {
            Self::Lite { stride, .. } => stride,
            Self::Down { .. } => 2,
            Self::Flat { .. } => 1,
        }
    }
}

const fn lite(expand: usize, out: usize, stride: usize) -> Row {
    Row::Lite {
        expand,
        out,
        stride,
    }
}

const fn down(expand: usize, out: usize) -> Row {
    Row::Down {
        expand,
        out,
        expand2: 4,
    }
}

const fn flat(expand: usize, out: usize) -> Row {
    Row::Flat { expand, out }
}

/// The rows of 151M and of all that are larger: widths in order, and how much the three blocks widen that follow the
/// first down-samplings.
const fn twelve([a, b, c]: [usize; 3], widths: [usize; 6]) -> [Row; 12] {
    let [w0, w1, w2, w3, w4, w5] = widths;
    [
        lite(2, w0, 1),
        down(6, w1),
        flat(a, w1),
        down(6, w2),
        flat(b, w2),
        down(6, w3),
        flat(c, w3),
        flat(6, w4),
        flat(6, w4),
        down(6, w5),
        flat(6, w5),
        flat(6, w5),
    ]
}

/// The rows of both 52M and 26M.
const NINE: [Row; 9] = [
    lite(3, 12, 2),
    flat(3, 12),
    down(6, 24),
    flat(3, 24),
    down(6, 48),
    flat(4, 48),
    flat(6, 64),
    down(6, 96),
    flat(6, 96),
];

const MF_508M: Table = Table {
    stem: 24,
    stem_stride: 2,
    tokens: [6, 192],
    groups: 1,
    rows: &twelve([3, 3, 4], [24, 40, 72, 128, 176, 240]),
    widen: None,
};

const MF_294M: Table = Table {
    stem: 16,
    rows: &twelve([4, 4, 4], [16, 24, 48, 96, 128, 192]),
    ..MF_508M
};

const MF_214M: Table = Table {
    stem: 12,
    rows: &twelve([3, 4, 4], [12, 20, 40, 80, 112, 160]),
    ..MF_508M
};

const MF_151M: Table = Table {
    stem: 12,
    rows: &twelve([3, 3, 4], [12, 16, 32, 64, 88, 128]),
    ..MF_508M
};

const MF_96M: Table = Table {
    stem: 12,
    tokens: [4, 128],
    rows: &[
        lite(2, 12, 1),
        down(6, 16),
        down(6, 32),
        flat(3, 32),
        down(6, 64),
        flat(4, 64),
        flat(6, 88),
        down(6, 128),
        flat(6, 128),
    ],
    ..MF_508M
};

const MF_52M: Table = Table {
    stem: 8,
    tokens: [3, 128],
    rows: &NINE,
    ..MF_508M
};

const MF_26M: Table = Table {
    groups: 4,
    ..MF_52M
};

const MF_W720: Table = Table {
    stem: 16,
    rows: &twelve([4, 4, 4], [16, 28, 60, 112, 120, 120]),
    widen: Some(720),
    ..MF_508M
};

const MF_W1440: Table = Table {
    stem: 32,
    tokens: [6, 256],
    rows: &twelve([4, 4, 4], [32, 56, 120, 224, 240, 240]),
    widen: Some(1440),
    ..MF_508M
};

const MF_W2880: Table = Table {
    stem: 64,
    tokens: [6, 384],
    rows: &twelve([4, 4, 4], [64, 112, 240, 448, 480, 480]),
    widen: Some(2880),
    ..MF_508M
};

const MF_TINY: Table = Table {
    stem: 24,
    tokens: [4, 48],
    rows: &[
        lite(2, 24, 1),
        down(6, 40),
        flat(6, 40),
        flat(6, 40),
        flat(6, 40),
        down(4, 48),
        flat(4, 48),
        flat(4, 64),
    ],
    widen: Some(192),
    ..MF_508M
};

const PUBLISHED: &str = "Mobile-Former, arXiv 2108.05895, without its classification head";
const OURS: &str =
    "Mobile-Former blocks in this project's own table, at the size of QB-Heat's encoder";
const OURS_WIDE: &str = "mf-w720 with all channels doubled or quadrupled";
const OURS_TINY: &str = "Mobile-Former blocks in this project's own table, for 32 and 64 px images";

/// A spec whose builder names its table: a function pointer cannot carry one along.
macro_rules! spec {
    ($name:literal, $table:ident, $source:expr, $strides:expr, $image_size:literal) => {
        EncoderSpec {
            name: $name,
            source: $source,
            strides: $strides,
            image_size: $image_size,
            tokens: $table.tokens[1],
            build: |build: Build, init: &mut Init| {
                Encoder::MobileFormer(MobileFormer::new(&$table, build, init))
            },
        }
    };
}

pub(in super::super) const ENCODERS: &[EncoderSpec] = &[
    spec!("mf-tiny", MF_TINY, OURS_TINY, &[8, 4], 64),
    spec!("mf-26m", MF_26M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-52m", MF_52M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-96m", MF_96M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-151m", MF_151M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-214m", MF_214M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-294m", MF_294M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-508m", MF_508M, PUBLISHED, &[32, 16, 8], 224),
    spec!("mf-w720", MF_W720, OURS, &[32, 16, 8], 224),
    spec!("mf-w1440", MF_W1440, OURS_WIDE, &[32, 16, 8], 224),
    spec!("mf-w2880", MF_W2880, OURS_WIDE, &[32, 16, 8], 224),
];
