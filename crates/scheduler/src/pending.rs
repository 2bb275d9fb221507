//! Pods that wait for a place: those to be looked at now, by priority and age, and those that found none.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::model::PodInfo;

/// Highest priority first, then first come.
type Order = (Reverse<i32>, u64);

#[derive(Debug, Default)]
pub(crate) struct Pending {
    pods: HashMap<String, (Arc<PodInfo>, Order)>,
    active: BTreeMap<Order, String>,
    parked: HashSet<String>,
    /// Refusals per class of equal pods, with the generation they hold for.
    refusals: HashMap<u64, (u64, Arc<str>)>,
    sequence: u64,
}

impl Pending {
    /// Adds a pod, or updates one that waits. A change that cannot matter (our own condition) wakes nothing.
    /// Returns whether there is something new to look at.
    pub fn upsert(&mut self, pod: Arc<PodInfo>) -> bool {
        if let Some((old, order)) = self.pods.get_mut(&pod.uid) {
            let same = old.class() == pod.class() && old.priority == pod.priority && old.owner == pod.owner;
            if same {
                *old = pod;
                return false;
            }
            let order = *order;
            self.active.remove(&order);
            self.parked.remove(&pod.uid);
        }
        self.sequence += 1;
        let order = (Reverse(pod.priority), self.sequence);
        self.active.insert(order, pod.uid.clone());
        self.pods.insert(pod.uid.clone(), (pod, order));
        true
    }

    pub fn remove(&mut self, uid: &str) {
        if let Some((_, order)) = self.pods.remove(uid) {
            self.active.remove(&order);
            self.parked.remove(uid);
        }
    }

    /// The next pod to look at. It stays known until removed or parked.
    pub fn pop(&mut self) -> Option<Arc<PodInfo>> {
        let (_, uid) = self.active.pop_first()?;
        self.pods.get(&uid).map(|(pod, _)| pod.clone())
    }

    /// Sets the pod aside until something makes room.
    pub fn park(&mut self, uid: &str) {
        if self.pods.contains_key(uid) {
            self.parked.insert(uid.to_owned());
        }
    }

    /// Looks at one parked pod again. Returns whether it was parked.
    pub fn unpark(&mut self, uid: &str) -> bool {
        match self.pods.get(uid) {
            Some((_, order)) if self.parked.remove(uid) => {
                self.active.insert(*order, uid.to_owned());
                true
            }
            _ => false,
        }
    }

    /// Looks at every parked pod again.
    pub fn wake(&mut self) {
        self.wake_if(|_| true);
    }

    /// Looks again at parked pods that want to be near others.
    pub fn wake_sociable(&mut self) -> bool {
        self.wake_if(|pod| !pod.affinity.is_empty())
    }

    fn wake_if(&mut self, which: impl Fn(&PodInfo) -> bool) -> bool {
        let mut woken = false;
        let pods = &self.pods;
        let active = &mut self.active;
        self.parked.retain(|uid| match pods.get(uid) {
            Some((pod, order)) if which(pod) => {
                active.insert(*order, uid.clone());
                woken = true;
                false
            }
            Some(_) => true,
            None => false,
        });
        woken
    }

    /// The refusal that still holds for pods of this class.
    pub fn refusal(&self, class: u64, generation: u64) -> Option<Arc<str>> {
        self.refusals
            .get(&class)
            .filter(|(of, _)| *of == generation)
            .map(|(_, message)| message.clone())
    }

    pub fn remember_refusal(&mut self, class: u64, generation: u64, message: Arc<str>) {
        // Only refusals of the newest generation are of use.
        if self.refusals.values().next().is_some_and(|(of, _)| *of != generation) {
            self.refusals.clear();
        }
        self.refusals.insert(class, (generation, message));
    }

    pub fn len(&self) -> usize {
        self.pods.len()
    }
}
