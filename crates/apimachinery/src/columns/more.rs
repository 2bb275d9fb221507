//! Columns and cells of batch and policy kinds, sets, quotas, requests for certificates, and service addresses.

use jiff::Timestamp;
use serde_json::Value;

use super::kinds::{containers, map_text, selector};
use super::{Column, age, human_duration, int, list, since, text};
use crate::meta;
use crate::usage;

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);

const fn shown(name: &'static str) -> Column {
    (name, "string", 0)
}

const fn wide(name: &'static str) -> Column {
    (name, "string", 1)
}

const fn number(name: &'static str) -> Column {
    (name, "integer", 0)
}

const CONTAINERS: Column = wide("Containers");
const IMAGES: Column = wide("Images");
const SELECTOR: Column = wide("Selector");

pub(super) fn columns(group: &str, plural: &str) -> Option<&'static [Column]> {
    Some(match (group, plural) {
        ("", "resourcequotas") => const { &[NAME, shown("Request"), shown("Limit"), AGE] },
        ("", "replicationcontrollers") => {
            const {
                &[
                    NAME,
                    number("Desired"),
                    number("Current"),
                    number("Ready"),
                    AGE,
                    CONTAINERS,
                    IMAGES,
                    SELECTOR,
                ]
            }
        }
        ("apps", "daemonsets") => {
            const {
                &[
                    NAME,
                    number("Desired"),
                    number("Current"),
                    number("Ready"),
                    number("Up-to-date"),
                    number("Available"),
                    shown("Node Selector"),
                    AGE,
                    CONTAINERS,
                    IMAGES,
                    SELECTOR,
                ]
            }
        }
        ("apps", "statefulsets") => const { &[NAME, shown("Ready"), AGE, CONTAINERS, IMAGES] },
        ("batch", "jobs") => {
            const {
                &[
                    NAME,
                    shown("Status"),
                    shown("Completions"),
                    shown("Duration"),
                    AGE,
                    CONTAINERS,
                    IMAGES,
                    SELECTOR,
                ]
            }
        }
        ("batch", "cronjobs") => {
            const {
                &[
                    NAME,
                    shown("Schedule"),
                    shown("Timezone"),
                    ("Suspend", "boolean", 0),
                    number("Active"),
                    shown("Last Schedule"),
                    AGE,
                    CONTAINERS,
                    IMAGES,
                    SELECTOR,
                ]
            }
        }
        ("policy", "poddisruptionbudgets") => {
            const {
                &[
                    NAME,
                    shown("Min Available"),
                    shown("Max Unavailable"),
                    number("Allowed Disruptions"),
                    AGE,
                ]
            }
        }
        ("certificates.k8s.io", "certificatesigningrequests") => {
            const {
                &[
                    NAME,
                    AGE,
                    shown("SignerName"),
                    shown("Requestor"),
                    shown("RequestedDuration"),
                    shown("Condition"),
                ]
            }
        }
        ("networking.k8s.io", "ipaddresses") => const { &[NAME, shown("ParentRef")] },
        ("networking.k8s.io", "servicecidrs") => const { &[NAME, shown("CIDRs"), AGE] },
        _ => return None,
    })
}

pub(super) fn cells(group: &str, plural: &str, o: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let name = || Value::from(meta::name(o));
    let age = || age(o, now);
    let wide = || {
        let (containers, images) = containers(o);
        [containers.into(), images.into()]
    };
    let row = match (group, plural) {
        ("", "resourcequotas") => {
            let (requests, limits) = quota(o);
            vec![name(), requests.into(), limits.into(), age()]
        }
        ("", "replicationcontrollers") => {
            let mut row = vec![
                name(),
                int(o, &["spec", "replicas"]).into(),
                int(o, &["status", "replicas"]).into(),
                int(o, &["status", "readyReplicas"]).into(),
                age(),
            ];
            row.extend(wide());
            row.push(map_text(&o["spec"]["selector"]).into());
            row
        }
        ("apps", "daemonsets") => {
            let status = |key: &str| Value::from(int(o, &["status", key]));
            let mut row = vec![
                name(),
                status("desiredNumberScheduled"),
                status("currentNumberScheduled"),
                status("numberReady"),
                status("updatedNumberScheduled"),
                status("numberAvailable"),
                map_text(&o["spec"]["template"]["spec"]["nodeSelector"]).into(),
                age(),
            ];
            row.extend(wide());
            row.push(selector(o).into());
            row
        }
        ("apps", "statefulsets") => {
            let (ready, wanted) = (int(o, &["status", "readyReplicas"]), int(o, &["spec", "replicas"]));
            let mut row = vec![name(), format!("{ready}/{wanted}").into(), age()];
            row.extend(wide());
            row
        }
        ("batch", "jobs") => {
            let mut row = vec![
                name(),
                job_status(o).into(),
                completions(o).into(),
                job_duration(o, now).into(),
                age(),
            ];
            row.extend(wide());
            row.push(selector(o).into());
            row
        }
        ("batch", "cronjobs") => {
            let last = o["status"]["lastScheduleTime"].as_str();
            let template = &o["spec"]["jobTemplate"];
            let (containers, images) = containers(template);
            vec![
                name(),
                text(o, &["spec", "schedule"]).into(),
                o["spec"]["timeZone"].as_str().unwrap_or("<none>").into(),
                (o["spec"]["suspend"] == true).into(),
                list(o, &["status", "active"]).len().into(),
                last.map_or("<none>".to_owned(), |at| since(Some(at), now)).into(),
                age(),
                containers.into(),
                images.into(),
                selector(template).into(),
            ]
        }
        ("policy", "poddisruptionbudgets") => {
            let amount = |key: &str| match &o["spec"][key] {
                Value::Null => "N/A".to_owned(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            vec![
                name(),
                amount("minAvailable").into(),
                amount("maxUnavailable").into(),
                int(o, &["status", "disruptionsAllowed"]).into(),
                age(),
            ]
        }
        ("certificates.k8s.io", "certificatesigningrequests") => {
            let duration = o["spec"]["expirationSeconds"].as_i64();
            let duration = duration.map_or("<none>".to_owned(), |s| {
                human_duration(jiff::SignedDuration::from_secs(s))
            });
            let signer = match text(o, &["spec", "signerName"]) {
                "" => "<none>",
                signer => signer,
            };
            vec![
                name(),
                age(),
                signer.into(),
                text(o, &["spec", "username"]).into(),
                duration.into(),
                request_state(o).into(),
            ]
        }
        ("networking.k8s.io", "ipaddresses") => {
            let parent = &o["spec"]["parentRef"];
            let parts = ["group", "resource", "namespace", "name"].map(|key| text(parent, &[key]));
            let parts: Vec<&str> = parts.into_iter().filter(|p| !p.is_empty()).collect();
            vec![name(), parts.join("/").into()]
        }
        ("networking.k8s.io", "servicecidrs") => {
            let cidrs = list(o, &["spec", "cidrs"]).iter().filter_map(Value::as_str);
            vec![name(), cidrs.collect::<Vec<_>>().join(",").into(), age()]
        }
        _ => return None,
    };
    Some(row)
}

/// `pods: 1/10, requests.cpu: 0/2` and the same of limits, by name.
fn quota(o: &Value) -> (String, String) {
    let used = usage::amounts(&o["status"]["used"]);
    let (limits, requests): (Vec<_>, Vec<_>) = usage::amounts(&o["status"]["hard"])
        .into_iter()
        .partition(|(name, _)| name.starts_with("limits"));
    let text = |side: Vec<(String, crate::quantity::Quantity)>| {
        let all: Vec<String> = side
            .into_iter()
            .map(|(name, hard)| format!("{name}: {}/{hard}", used.get(&name).copied().unwrap_or_default()))
            .collect();
        all.join(", ")
    };
    (text(requests), text(limits))
}

fn condition(o: &Value, kind: &str) -> bool {
    list(o, &["status", "conditions"])
        .iter()
        .any(|c| c["type"] == kind && c["status"] == "True")
}

fn job_status(o: &Value) -> &'static str {
    if condition(o, "Complete") {
        "Complete"
    } else if condition(o, "Failed") {
        "Failed"
    } else if meta::deletion_timestamp(o).is_some() {
        "Terminating"
    } else if condition(o, "Suspended") {
        "Suspended"
    } else if condition(o, "FailureTarget") {
        "FailureTarget"
    } else if condition(o, "SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    }
}

fn completions(o: &Value) -> String {
    let done = int(o, &["status", "succeeded"]);
    match (o["spec"]["completions"].as_i64(), int(o, &["spec", "parallelism"])) {
        (Some(wanted), _) => format!("{done}/{wanted}"),
        (None, parallel) if parallel > 1 => format!("{done}/1 of {parallel}"),
        _ => format!("{done}/1"),
    }
}

fn job_duration(o: &Value, now: Timestamp) -> String {
    let at = |key: &str| o["status"][key].as_str().and_then(|t| crate::time::parse(t).ok());
    match (at("startTime"), at("completionTime")) {
        (None, _) => String::new(),
        (Some(start), Some(end)) => human_duration(end.duration_since(start)),
        (Some(start), None) => human_duration(now.duration_since(start)),
    }
}

/// `Pending`, or what was decided, and whether the certificate is there.
fn request_state(o: &Value) -> String {
    let has = |kind: &str| list(o, &["status", "conditions"]).iter().any(|c| c["type"] == kind);
    let mut words = Vec::new();
    if has("Approved") && !has("Denied") {
        words.push("Approved");
    } else if has("Denied") {
        words.push("Denied");
    } else {
        words.push("Pending");
    }
    if has("Failed") {
        words.push("Failed");
    }
    if !text(o, &["status", "certificate"]).is_empty() {
        words.push("Issued");
    }
    words.join(",")
}
