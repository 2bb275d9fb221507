//! The vmSize table: what a node of a size advertises and may use. Sizes are compared without regard to case.
//!
//! A size is a promise about capacity, not about hardware: the machine's cgroup enforces the numbers, whatever host it is on.
//!
//! # Source
//! Azure's published size tables (vCPUs and memory); `max_pods` is the default of the `azure` network plug-in.

/// One row of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VmSize {
    /// Azure's spelling.
    pub name: &'static str,
    pub cpu_milli: i64,
    pub memory_bytes: i64,
    /// Pods per node if the pool does not say; a pool may ask for 10 to 250.
    pub max_pods: i64,
}

/// Size of a pool that names none (`az aks create` sends an empty string).
pub const DEFAULT: &str = "Standard_DS2_v2";

/// Default and bounds of `maxPods` with the `azure` network plug-in.
pub const MAX_PODS_DEFAULT: i64 = 30;
pub const MAX_PODS_RANGE: std::ops::RangeInclusive<i64> = 10..=250;

const GIB: i64 = 1 << 30;

const fn row(name: &'static str, vcpus: i64, memory_gib: i64) -> VmSize {
    VmSize {
        name,
        cpu_milli: vcpus * 1000,
        memory_bytes: memory_gib * GIB,
        max_pods: MAX_PODS_DEFAULT,
    }
}

/// Every size that can be asked for.
pub const SIZES: &[VmSize] = &[
    row("Standard_B2s", 2, 4),
    row("Standard_B2ms", 2, 8),
    row("Standard_B4ms", 4, 16),
    row("Standard_A2_v2", 2, 4),
    row("Standard_A4_v2", 4, 8),
    row("Standard_D2_v2", 2, 7),
    row("Standard_DS2_v2", 2, 7),
    row("Standard_DS3_v2", 4, 14),
    row("Standard_DS4_v2", 8, 28),
    row("Standard_D2s_v3", 2, 8),
    row("Standard_D4s_v3", 4, 16),
    row("Standard_D8s_v3", 8, 32),
    row("Standard_D2s_v5", 2, 8),
    row("Standard_D4s_v5", 4, 16),
    row("Standard_D8s_v5", 8, 32),
    row("Standard_D2ds_v5", 2, 8),
    row("Standard_D4ds_v5", 4, 16),
    row("Standard_D8ds_v5", 8, 32),
    row("Standard_E2s_v5", 2, 16),
    row("Standard_E4s_v5", 4, 32),
    row("Standard_F2s_v2", 2, 4),
    row("Standard_F4s_v2", 4, 8),
    row("Standard_F8s_v2", 8, 16),
];

/// Looks a size up; an empty name means [`DEFAULT`]. `None` if the table has no such size.
pub fn find(name: &str) -> Option<&'static VmSize> {
    let name = if name.is_empty() { DEFAULT } else { name };
    SIZES.iter().find(|s| s.name.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_means_default_and_case_does_not_matter() {
        assert_eq!(find("").unwrap().name, DEFAULT);
        assert_eq!(find("standard_ds2_V2").unwrap().cpu_milli, 2000);
        assert!(find("Standard_Nope").is_none());
    }
}
