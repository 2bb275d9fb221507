//! Defaults of DaemonSets.

use super::{Object, absent, child, template, text};

pub(super) fn daemon_set(spec: &mut Object) {
    absent(spec, "revisionHistoryLimit", 10);
    let strategy = child(spec, "updateStrategy");
    text(strategy, "type", "RollingUpdate");
    if strategy.get("type").is_some_and(|t| t == "RollingUpdate") {
        let rolling = child(strategy, "rollingUpdate");
        absent(rolling, "maxUnavailable", 1);
        absent(rolling, "maxSurge", 0);
    }
    template(spec);
}
