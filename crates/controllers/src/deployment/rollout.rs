//! The arithmetic of a rollout: how many replicas each ReplicaSet of a Deployment should have next. Pure, and about
//! numbers only.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// One ReplicaSet, reduced to numbers. `wanted` is changed by the functions here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// `spec.replicas`.
    pub wanted: i32,
    /// `status.availableReplicas`.
    pub available: i32,
    /// `status.replicas`.
    pub current: i32,
    /// The `max-replicas` annotation: the Deployment's size with surge when this one was last scaled.
    pub annotated_max: Option<i32>,
}

/// The bounds of a rolling update, resolved to pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// `spec.replicas` of the Deployment.
    pub replicas: i32,
    /// Pods allowed above that.
    pub surge: i32,
    /// Pods that may be missing below that.
    pub unavailable: i32,
}

impl Bounds {
    /// Resolves the strategy's numbers or percentages: surge rounds up, unavailability down; both zero would never move,
    /// so then one may be unavailable.
    pub fn new(replicas: i32, surge: Option<&IntOrString>, unavailable: Option<&IntOrString>) -> Self {
        let surge = resolve(surge, replicas, true);
        let mut unavailable = resolve(unavailable, replicas, false);
        if surge == 0 && unavailable == 0 {
            unavailable = 1;
        }
        Self {
            replicas,
            surge,
            unavailable: unavailable.min(replicas),
        }
    }

    fn available_min(&self) -> i32 {
        self.replicas - self.unavailable
    }
}

fn resolve(value: Option<&IntOrString>, of: i32, up: bool) -> i32 {
    match value {
        None => resolve(Some(&IntOrString::String("25%".to_owned())), of, up),
        Some(IntOrString::Int(n)) => (*n).max(0),
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or_default();
            let scaled = percent * i64::from(of);
            let rounded = if up { (scaled + 99) / 100 } else { scaled / 100 };
            rounded.clamp(0, i64::from(i32::MAX)) as i32
        }
    }
}

/// How many replicas a new ReplicaSet gets beside old ones that have `others` in sum; `now` is what it has.
pub fn new_size(bounds: Bounds, now: i32, others: i32) -> i32 {
    if now >= bounds.replicas {
        return bounds.replicas;
    }
    let room = bounds.replicas + bounds.surge - (now + others);
    if room <= 0 {
        now
    } else {
        now + room.min(bounds.replicas - now)
    }
}

/// Shrinks old ReplicaSets (oldest first) as far as availability allows: first what is unhealthy anyway, then the rest.
pub fn shrink_old(bounds: Bounds, new: &Size, old: &mut [Size]) {
    let all = new.wanted + old.iter().map(|s| s.wanted).sum::<i32>();
    let mut budget = all - bounds.available_min() - (new.wanted - new.available);
    if budget <= 0 {
        return;
    }
    for size in old.iter_mut() {
        let unhealthy = (size.wanted - size.available).clamp(0, budget);
        size.wanted -= unhealthy;
        budget -= unhealthy;
    }
    let available = new.available + old.iter().map(|s| s.available).sum::<i32>();
    let mut spare = available - bounds.available_min();
    for size in old.iter_mut() {
        if spare <= 0 {
            return;
        }
        let cut = size.wanted.min(spare);
        size.wanted -= cut;
        spare -= cut;
    }
}

/// Spreads a change of the Deployment's own size over all its ReplicaSets in proportion, so that a rollout under way
/// keeps its risk. `sizes` is ordered newest first; `fallback_max` stands in where no annotation says the old size.
pub fn scale_in_proportion(bounds: Bounds, sizes: &mut [Size], fallback_max: i32) {
    let total: i32 = sizes.iter().map(|s| s.wanted).sum();
    let allowed = if bounds.replicas > 0 {
        bounds.replicas + bounds.surge
    } else {
        0
    };
    let change = allowed - total;
    // Largest first; among equals the newest grows and the oldest shrinks first.
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    if change < 0 {
        order.reverse();
    }
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i].wanted));
    let mut done = 0;
    for &i in &order {
        let size = &mut sizes[i];
        if change == 0 || change == done || size.wanted == 0 {
            continue;
        }
        let before = size.annotated_max.filter(|m| *m > 0).unwrap_or(fallback_max.max(1));
        let scaled = f64::from(size.wanted) * f64::from(allowed) / f64::from(before);
        let share = scaled.round() as i32 - size.wanted;
        let left = change - done;
        let step = if change > 0 { share.min(left) } else { share.max(left) };
        size.wanted = (size.wanted + step).max(0);
        done += step;
    }
    if let Some(&first) = order.first() {
        sizes[first].wanted = (sizes[first].wanted + change - done).max(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(wanted: i32, available: i32) -> Size {
        Size {
            wanted,
            available,
            current: wanted,
            annotated_max: None,
        }
    }

    #[test]
    fn bounds_round_towards_progress() {
        let percent = |p: &str| IntOrString::String(p.to_owned());
        let b = Bounds::new(10, None, None);
        assert_eq!((b.surge, b.unavailable), (3, 2));
        let b = Bounds::new(1, Some(&percent("0%")), Some(&percent("25%")));
        assert_eq!((b.surge, b.unavailable), (0, 1));
        let b = Bounds::new(3, Some(&IntOrString::Int(1)), Some(&IntOrString::Int(0)));
        assert_eq!((b.surge, b.unavailable), (1, 0));
    }

    #[test]
    fn a_rollout_never_leaves_its_bounds_and_ends() {
        for replicas in 0..12 {
            for (surge, unavailable) in [(1, 0), (0, 1), (3, 2), (100, 100)] {
                let bounds = Bounds::new(
                    replicas,
                    Some(&IntOrString::Int(surge)),
                    Some(&IntOrString::Int(unavailable)),
                );
                let (mut new, mut old) = (size(0, 0), vec![size(replicas, replicas)]);
                let mut rounds = 0;
                while new.available != replicas || old[0].current != 0 {
                    new.wanted = new_size(bounds, new.wanted, old[0].wanted);
                    shrink_old(bounds, &new, &mut old);
                    assert!(new.wanted + old[0].wanted <= replicas + bounds.surge);
                    // One pod at a time comes or goes.
                    if old[0].current > old[0].wanted {
                        old[0].current -= 1;
                        old[0].available = old[0].available.min(old[0].current);
                    } else if new.available < new.wanted {
                        new.available += 1;
                    }
                    assert!(new.available + old[0].available >= replicas - bounds.unavailable);
                    rounds += 1;
                    assert!(rounds < 200, "{bounds:?} stuck at {new:?} {old:?}");
                }
            }
        }
    }

    #[test]
    fn unhealthy_old_replicas_go_first() {
        let bounds = Bounds {
            replicas: 4,
            surge: 1,
            unavailable: 1,
        };
        let mut old = vec![size(2, 0), size(2, 2)];
        shrink_old(bounds, &size(1, 1), &mut old);
        assert_eq!(old.iter().map(|s| s.wanted).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn scaling_during_a_rollout_keeps_proportions() {
        let bounds = Bounds {
            replicas: 20,
            surge: 5,
            unavailable: 5,
        };
        let annotated = |wanted| Size {
            annotated_max: Some(13),
            ..size(wanted, wanted)
        };
        let mut sizes = vec![annotated(5), annotated(8)];
        scale_in_proportion(bounds, &mut sizes, 10);
        assert_eq!(sizes.iter().map(|s| s.wanted).collect::<Vec<_>>(), [10, 15]);
        let mut sizes = vec![annotated(5), annotated(8)];
        scale_in_proportion(
            Bounds {
                replicas: 0,
                surge: 1,
                unavailable: 0,
            },
            &mut sizes,
            10,
        );
        assert_eq!(sizes.iter().map(|s| s.wanted).collect::<Vec<_>>(), [0, 0]);
    }
}
