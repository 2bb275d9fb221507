//! Named steps at which tests end the process; nothing but a name in builds without debug assertions.

/// Every step, in no particular order; each is passed by at least one verb in at least one mode.
pub const ALL: [&str; 21] = [
    "state-written",
    "pool-learned",
    "reserved",
    "bridge-made",
    "bridge-set",
    "tunnel-route",
    "tunnel-exception",
    "tunnel-rule",
    "veth-made",
    "pod-configured",
    "neighbour-set",
    "routed",
    "link-deleted",
    "route-deleted",
    "neighbour-deleted",
    "released",
    "masqueraded",
    "masquerade-gone",
    "exception-gone",
    "tunnel-gone",
    "bridge-deleted",
];

/// Variable that names the step at which to end: `<step>` as by kill -9, `panic:<step>` with a panic.
pub const VARIABLE: &str = "AZURE_VNET_END_AT";

#[cfg(debug_assertions)]
pub fn reached(step: &str) {
    debug_assert!(ALL.contains(&step), "{step} is not in the list");
    match std::env::var(VARIABLE) {
        Ok(at) if at == step => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        Ok(at) if at.strip_prefix("panic:") == Some(step) => panic!("a test wanted this at {step}"),
        _ => {}
    }
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn reached(_step: &str) {}
