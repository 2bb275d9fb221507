//! What a ServiceCIDR needs next. Pure.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::common::is_deleting;

/// Holds a range while its addresses are in use.
pub const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const READY: &str = "Ready";

/// The next step; each is followed by a change that wakes the controller again.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Nothing,
    /// Add the finalizer.
    Hold,
    /// Remove the finalizer.
    Release,
    /// Set the condition.
    Say(Condition),
}

/// Plans for `range` beside the other ranges and all addresses.
pub fn plan(range: &ServiceCIDR, others: &[Arc<ServiceCIDR>], addresses: &[Arc<IPAddress>], now: Timestamp) -> Step {
    let held = range.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER);
    if !is_deleting(range) {
        if !held {
            return Step::Hold;
        }
        return say(range, "True", "", "Kubernetes Service CIDR is ready", now);
    }
    if !held {
        return Step::Nothing;
    }
    let elsewhere = |ip: IpAddr| others.iter().filter(|r| !is_deleting(&***r)).any(|r| holds(r, ip));
    let in_use = addresses
        .iter()
        .filter_map(|a| a.metadata.name.as_deref()?.parse().ok())
        .any(|ip| holds(range, ip) && !elsewhere(ip));
    if in_use {
        let why =
            "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
        return say(range, "False", "Terminating", why, now);
    }
    Step::Release
}

fn say(range: &ServiceCIDR, status: &str, reason: &str, message: &str, now: Timestamp) -> Step {
    let conditions = range.status.as_ref().and_then(|s| s.conditions.as_ref());
    let old = conditions.into_iter().flatten().find(|c| c.type_ == READY);
    if old.is_some_and(|c| c.status == status && c.reason == reason && c.message == message) {
        return Step::Nothing;
    }
    let since = old
        .filter(|c| c.status == status)
        .map(|c| c.last_transition_time.clone());
    Step::Say(Condition {
        type_: READY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: since.unwrap_or(Time(now)),
        observed_generation: None,
    })
}

/// Whether one of the range's networks holds the address.
fn holds(range: &ServiceCIDR, ip: IpAddr) -> bool {
    let cidrs = range.spec.as_ref().and_then(|s| s.cidrs.as_ref());
    cidrs.into_iter().flatten().any(|cidr| {
        let parsed = cidr
            .split_once('/')
            .and_then(|(network, bits)| Some((network.parse().ok()?, bits.parse::<u32>().ok()?)));
        match (parsed, ip) {
            (Some((IpAddr::V4(network), bits)), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
                u32::from(network) & mask == u32::from(ip) & mask
            }
            (Some((IpAddr::V6(network), bits)), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
                u128::from(network) & mask == u128::from(ip) & mask
            }
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn range(name: &str, cidr: &str, rest: Value) -> Arc<ServiceCIDR> {
        let mut meta = json!({"name": name});
        for (k, v) in rest.as_object().unwrap() {
            meta[k] = v.clone();
        }
        Arc::new(serde_json::from_value(json!({"metadata": meta, "spec": {"cidrs": [cidr]}})).unwrap())
    }

    #[test]
    fn a_range_goes_when_nothing_needs_it() {
        let now = apimachinery::time::parse("2026-01-02T03:04:05Z").unwrap();
        let used: Arc<IPAddress> = Arc::new(serde_json::from_value(json!({"metadata": {"name": "10.1.0.9"}})).unwrap());
        let held = json!({"finalizers": [FINALIZER]});
        let going = json!({"finalizers": [FINALIZER], "deletionTimestamp": "2026-01-02T03:04:05Z"});
        let step =
            |r: &ServiceCIDR, others: &[Arc<ServiceCIDR>], used: &[Arc<IPAddress>]| match plan(r, others, used, now) {
                Step::Say(c) => format!("{} {}", c.status, c.reason),
                other => format!("{other:?}"),
            };
        let check = |rest: &Value, others: &[Arc<ServiceCIDR>], used: &[Arc<IPAddress>], want: &str| {
            assert_eq!(step(&range("a", "10.1.0.0/24", rest.clone()), others, used), want);
        };
        check(&json!({}), &[], &[], "Hold");
        check(&held, &[], &[], "True ");
        check(&going, &[], std::slice::from_ref(&used), "False Terminating");
        check(&going, &[], &[], "Release");
        let wider = range("b", "10.1.0.0/16", held.clone());
        check(&going, &[wider], std::slice::from_ref(&used), "Release");
        let wider = range("b", "10.1.0.0/16", going.clone());
        check(&going, &[wider], &[used], "False Terminating");
    }
}
