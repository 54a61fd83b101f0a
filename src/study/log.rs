//! What a run's log says of its course.

use serde_json::Value;

/// The course of a run, whatever it trained.
#[derive(Default)]
pub(super) struct Log {
    /// Minutes that its steps took.
    pub minutes: f64,
    /// Loss of the last epoch's steps, averaged.
    pub loss: Option<f64>,
    /// k-NN accuracy along the way, by minutes.
    pub curve: Vec<(f64, f64)>,
    /// Effective rank of the features along the way, by minutes.
    pub ranks: Vec<(f64, f64)>,
    /// AP of a detector along the way, by minutes.
    pub aps: Vec<(f64, f64)>,
}

impl Log {
    pub fn of(events: &[Value]) -> Self {
        let mut log = Self::default();
        let mut losses: (f64, u64) = (0.0, 0);
        for event in events {
            match event["kind"].as_str() {
                Some("step") => {
                    let parts = event["ms"].as_object();
                    let milliseconds: f64 = parts
                        .into_iter()
                        .flat_map(|parts| parts.values())
                        .filter_map(Value::as_f64)
                        .sum();
                    log.minutes += milliseconds / 6e4;
                    losses = (
                        losses.0 + event["loss"].as_f64().unwrap_or(0.0),
                        losses.1 + 1,
                    );
                }
                Some("epoch") => {
                    let point = |key: &str| Some((log.minutes, event[key].as_f64()?));
                    log.curve.extend(point("knn_top1"));
                    log.ranks.extend(point("effective_rank"));
                    log.aps.extend(point("ap"));
                    log.loss = (losses.1 > 0).then(|| losses.0 / losses.1 as f64);
                    losses = (0.0, 0);
                }
                _ => {}
            }
        }
        log
    }
}
