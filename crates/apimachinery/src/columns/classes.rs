//! Columns and cells of classes, ingresses, templates and revisions.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::kinds::map_text;
use super::{Column, age, int, list, text};
use crate::meta;

const NAME: Column = ("Name", "string", 0);
const AGE: Column = ("Age", "string", 0);

const fn shown(name: &'static str) -> Column {
    (name, "string", 0)
}

/// Most hosts in one cell.
const HOSTS_MAX: usize = 3;
/// Longest text of an ingress's addresses.
const ADDRESS_MAX: usize = 16;

pub(super) fn columns(group: &str, plural: &str) -> Option<&'static [Column]> {
    Some(match (group, plural) {
        ("", "podtemplates") => const { &[NAME, shown("Containers"), shown("Images"), shown("Pod Labels")] },
        ("apps", "controllerrevisions") => const { &[NAME, shown("Controller"), shown("Revision"), AGE] },
        ("networking.k8s.io", "ingressclasses") => const { &[NAME, shown("Controller"), shown("Parameters"), AGE] },
        ("networking.k8s.io", "ingresses") => {
            const {
                &[
                    NAME,
                    shown("Class"),
                    shown("Hosts"),
                    shown("Address"),
                    shown("Ports"),
                    AGE,
                ]
            }
        }
        ("scheduling.k8s.io", "priorityclasses") => {
            const {
                &[
                    NAME,
                    ("Value", "integer", 0),
                    ("Global-Default", "boolean", 0),
                    AGE,
                    shown("PreemptionPolicy"),
                ]
            }
        }
        ("storage.k8s.io", "storageclasses") => {
            const {
                &[
                    NAME,
                    shown("Provisioner"),
                    shown("ReclaimPolicy"),
                    shown("VolumeBindingMode"),
                    shown("AllowVolumeExpansion"),
                    AGE,
                ]
            }
        }
        _ => return super::more::columns(group, plural),
    })
}

pub(super) fn cells(group: &str, plural: &str, o: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let name = || Value::from(meta::name(o));
    let age = || age(o, now);
    Some(match (group, plural) {
        ("", "podtemplates") => {
            let containers = list(o, &["template", "spec", "containers"]);
            let all = |key: &str| containers.iter().map(|c| text(c, &[key])).collect::<Vec<_>>().join(",");
            let labels = map_text(&o["template"]["metadata"]["labels"]);
            vec![name(), all("name").into(), all("image").into(), labels.into()]
        }
        ("apps", "controllerrevisions") => {
            let owner = meta::controller_of(o).map_or("<none>".to_owned(), |c| {
                let (group, _) = crate::gvk::split_api_version(c.api_version);
                let dot = if group.is_empty() { "" } else { "." };
                format!("{}{dot}{group}/{}", c.kind.to_lowercase(), c.name)
            });
            vec![name(), owner.into(), int(o, &["revision"]).into(), age()]
        }
        ("networking.k8s.io", "ingressclasses") => vec![
            marked(o, &["ingressclass.kubernetes.io/is-default-class"]).into(),
            text(o, &["spec", "controller"]).into(),
            parameters(&o["spec"]["parameters"]).into(),
            age(),
        ],
        ("networking.k8s.io", "ingresses") => {
            let class = o["spec"]["ingressClassName"].as_str().unwrap_or("<none>");
            let tls = !list(o, &["spec", "tls"]).is_empty();
            vec![
                name(),
                class.into(),
                hosts(list(o, &["spec", "rules"])).into(),
                addresses(o).into(),
                if tls { "80, 443" } else { "80" }.into(),
                age(),
            ]
        }
        ("scheduling.k8s.io", "priorityclasses") => vec![
            name(),
            int(o, &["value"]).into(),
            (o["globalDefault"] == true).into(),
            age(),
            text(o, &["preemptionPolicy"]).into(),
        ],
        ("storage.k8s.io", "storageclasses") => vec![
            marked(
                o,
                &[
                    "storageclass.kubernetes.io/is-default-class",
                    "storageclass.beta.kubernetes.io/is-default-class",
                ],
            )
            .into(),
            text(o, &["provisioner"]).into(),
            o["reclaimPolicy"].as_str().unwrap_or("Delete").into(),
            o["volumeBindingMode"].as_str().unwrap_or("Immediate").into(),
            (o["allowVolumeExpansion"] == true).into(),
            age(),
        ],
        _ => return super::more::cells(group, plural, o, now),
    })
}

/// The name, and whether one of these annotations makes the class the default.
fn marked(o: &Value, annotations: &[&str]) -> String {
    let default = annotations.iter().any(|a| meta::annotation(o, a) == Some("true"));
    format!("{}{}", meta::name(o), if default { " (default)" } else { "" })
}

fn parameters(reference: &Value) -> String {
    if reference.is_null() {
        return "<none>".into();
    }
    let group = reference["apiGroup"]
        .as_str()
        .map_or(String::new(), |g| format!(".{g}"));
    format!("{}{group}/{}", text(reference, &["kind"]), text(reference, &["name"]))
}

fn hosts(rules: &[Value]) -> String {
    let named: Vec<&str> = rules
        .iter()
        .map(|r| text(r, &["host"]))
        .filter(|h| !h.is_empty())
        .take(HOSTS_MAX)
        .collect();
    match named.len() {
        0 => "*".into(),
        HOSTS_MAX if rules.len() > HOSTS_MAX => format!("{} + {} more...", named.join(","), rules.len() - HOSTS_MAX),
        _ => named.join(","),
    }
}

fn addresses(o: &Value) -> String {
    let one = |i: &Value| {
        [text(i, &["ip"]), text(i, &["hostname"])]
            .into_iter()
            .find(|t| !t.is_empty())
            .map(str::to_owned)
    };
    let all: BTreeSet<String> = list(o, &["status", "loadBalancer", "ingress"])
        .iter()
        .filter_map(one)
        .collect();
    let joined = all.into_iter().collect::<Vec<_>>().join(",");
    match joined.char_indices().nth(ADDRESS_MAX) {
        Some(_) => format!("{}...", joined.chars().take(ADDRESS_MAX - 3).collect::<String>()),
        None => joined,
    }
}
