//! Removes everything of an instance by name: works without a server, without data and after any crash.

use std::path::Path;

use linux::netlink::{Request, Route};
use linux::netns::{self, NetNs};
use linux::nft::{Family, Nft};
use linux::sysctl;

use crate::Error;
use crate::names::{edge_pin, host_link, host_table, pins, vnet_of_pin};

/// What the alias of the host's link begins with; `key=value` pairs to be put back follow.
const RESTORE: &str = "restore";

/// Text for the host link's alias: sysctls of other links with the values they had before. It lives and dies with the
/// link, so there is no file to lose.
pub fn restore_note(before: &[(String, String)]) -> String {
    before
        .iter()
        .fold(RESTORE.to_owned(), |text, (key, value)| format!("{text} {key}={value}"))
}

/// The notes of an alias.
pub fn restore_of(alias: Option<&str>) -> Vec<(String, String)> {
    let Some(rest) = alias.and_then(|a| a.strip_prefix(RESTORE)) else {
        return Vec::new();
    };
    rest.split_whitespace()
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Removes the instance's links, routes, tables and namespaces from the calling thread's network namespace, and puts
/// back the sysctls it changed. Goes on after an error and returns all of them; nothing there is success.
pub fn teardown(instance: &str, run_dir: &Path) -> Result<(), Vec<Error>> {
    let mut errors = Vec::new();
    let mut keep = |result: Result<(), Error>| errors.extend(result.err());
    keep(host(instance));
    let dir = pins(run_dir);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries.flatten().map(|e| e.path()).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            keep(Err(Error::Read {
                path: dir.clone(),
                source,
            }));
            Vec::new()
        }
    };
    for pin in entries {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if pin == edge_pin(run_dir) || vnet_of_pin(&name).is_some() {
            keep(
                NetNs::current()
                    .map_err(Error::from)
                    .and_then(|host| namespace(&pin, &host)),
            );
        }
    }
    // Empty now, unless machines keep pins of their own there.
    let _ = std::fs::remove_dir(&dir);
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn host(instance: &str) -> Result<(), Error> {
    let mut route = Route::open()?;
    let mut first = None;
    if let Some(link) = route.link(&host_link(instance))? {
        for (key, value) in restore_of(link.alias.as_deref()) {
            // The other link may be gone by now; then there is nothing to put back.
            match sysctl::set(&key, &value) {
                Ok(_) | Err(sysctl::Error::Read { .. }) => {}
                Err(e) => first = first.or(Some(e.into())),
            }
        }
        route.run(Request::delete_link(link.index))?;
    }
    Nft::open()?.delete_table(Family::Ip, &host_table(instance))?;
    first.map_or(Ok(()), Err)
}

/// Empties a namespace, giving back to `host` what was handed over (sockets of a process may keep it alive for a while) and removes its pin.
pub fn namespace(pin: &Path, host: &NetNs) -> Result<(), Error> {
    let emptied = match netns::open(pin) {
        Ok(ns) => empty(&ns, host),
        Err(_) => Ok(()),
    };
    netns::delete(pin)?;
    emptied
}

fn empty(ns: &NetNs, host: &NetNs) -> Result<(), Error> {
    let mut route = Route::open_in(ns)?;
    crate::sites::give_back(&mut route, host)?;
    // All at once: one wait of the kernel for its readers, not one per link.
    route.run(Request::delete_group(crate::names::LINK_GROUP))?;
    let rest: Vec<Request> = route
        .links()?
        .iter()
        .filter(|l| l.name != "lo")
        .map(|l| Request::delete_link(l.index))
        .collect();
    Ok(route.run_all(&rest)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_the_alias() {
        let before = vec![("net/ipv4/conf/eth0.5/forwarding".to_owned(), "0".to_owned())];
        assert_eq!(restore_of(Some(&restore_note(&before))), before);
        assert_eq!(restore_of(Some("something else")), []);
        assert_eq!(restore_of(None), []);
    }
}
