//! Network sysctls of the calling thread's network namespace; nothing outside `net.` can be named.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

#[derive(Debug, Error)]
pub enum Error {
    #[error("{key:?} is not a key below net.")]
    NotNetwork { key: String },
    #[error("cannot read sysctl {key}")]
    Read { key: String, source: io::Error },
    #[error("cannot set sysctl {key} to {value:?}")]
    Write {
        key: String,
        value: String,
        source: io::Error,
    },
}

/// Path below `/proc/sys` of a key such as `net/ipv4/conf/eth0.5/forwarding`; both `/` and `.` separate parts, but a key
/// that has a `/` is not split at dots (link names may contain dots).
fn path(key: &str) -> Result<PathBuf, Error> {
    let parts: Vec<&str> = if key.contains('/') {
        key.split('/').collect()
    } else {
        key.split('.').collect()
    };
    let safe = parts.len() > 1 && parts[0] == "net" && parts.iter().all(|p| !p.is_empty() && *p != "." && *p != "..");
    if !safe {
        return Err(Error::NotNetwork { key: key.to_owned() });
    }
    Ok(parts.iter().fold(PathBuf::from("/proc/sys"), |p, part| p.join(part)))
}

/// Value without its trailing line end.
pub fn get(key: &str) -> Result<String, Error> {
    let text = std::fs::read_to_string(path(key)?).map_err(|source| Error::Read {
        key: key.to_owned(),
        source,
    })?;
    Ok(text.trim_end().to_owned())
}

/// Sets `key`; returns the value it had before.
pub fn set(key: &str, value: &str) -> Result<String, Error> {
    let before = get(key)?;
    if before != value {
        std::fs::write(path(key)?, value).map_err(|source| Error::Write {
            key: key.to_owned(),
            value: value.to_owned(),
            source,
        })?;
    }
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_keys_of_this_namespace() {
        std::thread::spawn(|| {
            crate::netns::become_private_host(&[]).unwrap();
            assert_eq!(set("net.ipv4.ip_forward", "1").unwrap(), "0");
            assert_eq!(get("net/ipv4/conf/lo/forwarding").unwrap(), "1");
            for bad in ["kernel.pid_max", "vm.swappiness", "net/../kernel/pid_max", "net"] {
                assert!(matches!(set(bad, "1"), Err(Error::NotNetwork { .. })), "{bad}");
            }
        })
        .join()
        .unwrap();
    }
}
