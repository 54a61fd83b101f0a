//! Minutes of training: those that a study gave, and those that the clock saw.

use super::table::mean;

/// What minutes in a table are.
pub(crate) const MINUTES: &str = "Minutes are those of training steps, without scoring along the way. Where a study gives \
    minutes and they are more than an epoch, these come first, counted at the pace that it measured before, and those on \
    the clock follow.";

/// What a cell's training took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Minutes {
    /// What the study gave, at the pace that it measured once; none where it counts epochs, nothing was trained, or there
    /// was one epoch: the least, however long it takes.
    pub counted: Option<f64>,
    /// What the steps took; other work on the machine is in it.
    pub taken: f64,
}

impl Minutes {
    /// Of `epochs` that took so long.
    pub(super) fn of(given: Option<f64>, epochs: usize, taken: f64) -> Self {
        Self {
            counted: given.filter(|_| epochs > 1),
            taken,
        }
    }

    /// Those of several cells: counted where all were given the same, taken on average.
    pub(super) fn mean(all: &[Self]) -> Self {
        let same = all.windows(2).all(|two| two[0].counted == two[1].counted);
        let taken: Vec<f64> = all.iter().map(|minutes| minutes.taken).collect();
        Self {
            counted: all.first().and_then(|first| first.counted.filter(|_| same)),
            taken: mean(&taken),
        }
    }

    /// `12.3`, or `10 (12.3 on the clock)` where minutes were given.
    pub fn figure(&self) -> String {
        match self.counted {
            Some(counted) => format!("{counted} ({:.1} on the clock)", self.taken),
            None => format!("{:.1}", self.taken),
        }
    }

    /// Points by minutes on the clock, by those that count.
    pub fn count(&self, curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let scale = match self.counted {
            Some(counted) if self.taken > 0.0 => counted / self.taken,
            _ => 1.0,
        };
        curve.iter().map(|&(x, y)| (x * scale, y)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_ends_at_the_minutes_that_were_given() {
        let minutes = Minutes::of(Some(30.0), 5, 60.0);
        assert_eq!(minutes.figure(), "30 (60.0 on the clock)");
        let counted = minutes.count(&[(20.0, 1.0), (60.0, 2.0)]);
        assert_eq!(counted, [(10.0, 1.0), (30.0, 2.0)]);
        let slower = Minutes::of(Some(30.0), 5, 90.0);
        assert_eq!(
            Minutes::mean(&[minutes, slower]).figure(),
            "30 (75.0 on the clock)"
        );
    }

    #[test]
    fn without_minutes_given_the_clock_counts() {
        for minutes in [
            Minutes::of(None, 5, 2.25),
            Minutes::of(Some(30.0), 0, 0.0),
            Minutes::of(Some(30.0), 1, 90.0),
        ] {
            assert_eq!(minutes.count(&[(1.5, 2.0)]), [(1.5, 2.0)]);
            assert_eq!(minutes.figure(), format!("{:.1}", minutes.taken));
        }
    }
}
