//! Hostile input for tests: mutations of a corpus, the same in every run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::random::{Purpose, stream};

/// `QBHEAT_FUZZ=100000` makes the long form of each test that calls [`survives`].
const COUNT: &str = "QBHEAT_FUZZ";
/// Far beyond what any mutation takes, far below what a claimed size of gigabytes would.
const LONGEST: Duration = Duration::from_secs(10);

/// Gives mutations of `corpus` to `body`, which must neither panic nor hang; `default` of them unless told otherwise.
pub fn survives(corpus: &[Vec<u8>], default: u64, body: impl Fn(&[u8])) {
    let count = std::env::var(COUNT).map_or(default, |text| text.parse().expect("a number"));
    for seed in 0..count {
        let bytes = mutation(corpus, seed);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| body(&bytes)));
        assert!(result.is_ok(), "the mutation of seed {seed} panics");
        let taken = start.elapsed();
        assert!(
            taken < LONGEST,
            "the mutation of seed {seed} takes {taken:?}"
        );
    }
}

/// One, two, four or eight changes of one file: a flipped bit, a byte or a word that means much, a part cut off, left out, or
/// taken from another file.
fn mutation(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let random = &mut stream(seed, Purpose::Sample, 0, 0);
    let mut bytes = pick(corpus, random).clone();
    for _ in 0..1 << random.random_range(0..4) {
        if bytes.is_empty() {
            break;
        }
        // Headers are small and decide much.
        let end = match random.random_bool(0.25) {
            true => bytes.len().min(64),
            false => bytes.len(),
        };
        let at = random.random_range(0..end);
        match random.random_range(0..6) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = *pick(&[0, 1, 0x7f, 0x80, 0xff], random),
            2 => {
                let word: u32 = *pick(&[0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX], random);
                let until = bytes.len().min(at + 4);
                bytes[at..until].copy_from_slice(&word.to_be_bytes()[..until - at]);
            }
            3 => bytes.truncate(at),
            4 => {
                let until = bytes.len().min(at + random.random_range(1..32));
                bytes.drain(at..until);
            }
            _ => {
                let other = pick(corpus, random);
                let from = random.random_range(0..other.len());
                let until = other.len().min(from + random.random_range(1..64));
                bytes.splice(at..at, other[from..until].iter().copied());
            }
        }
    }
    bytes
}

fn pick<'a, T>(choices: &'a [T], random: &mut ChaCha8Rng) -> &'a T {
    &choices[random.random_range(0..choices.len())]
}
