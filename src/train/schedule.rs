//! The learning rate of each step.

use serde::{Deserialize, Serialize};

/// What the learning rate does after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Falls to 0 along half a cosine; the length of the run must be known in advance.
    Cosine,
    /// Stays; a run can be made longer.
    Constant,
}

/// Linear warm-up, then the schedule.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    /// The highest value.
    pub peak: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The shape after the warm-up.
    pub schedule: Schedule,
}

impl LearningRate {
    /// For step 0, 1, …: `peak·(step+1)/warmup_steps` while warming up, then for [`Schedule::Cosine`]
    /// `peak·½(1 + cos(π·t))`, t running from 0 to 1 over the remaining steps.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.peak,
            Schedule::Cosine => {
                let remaining = (self.total_steps - self.warmup_steps).max(1) as f64;
                let progress = ((step - self.warmup_steps) as f64 / remaining).min(1.0);
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_is_linear_and_the_cosine_passes_half_its_way_at_half_the_rate() {
        let mut rate = LearningRate {
            peak: 2.0,
            warmup_steps: 4,
            total_steps: 104,
            schedule: Schedule::Cosine,
        };
        let start: Vec<f64> = (0..5).map(|step| rate.at(step)).collect();
        assert_eq!(start, [0.5, 1.0, 1.5, 2.0, 2.0]);
        assert!((rate.at(54) - 1.0).abs() < 1e-12);
        assert!(rate.at(103) > 0.0 && rate.at(103) < 1e-3 && rate.at(104) < 1e-12);
        rate.schedule = Schedule::Constant;
        assert_eq!(rate.at(103), 2.0);
    }
}
