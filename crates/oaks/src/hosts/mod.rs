//! Several physical hosts: `oaks host token` on the first one, `oaks host join` on the others.
//!
//! A token is a line of text: where home answers and its CA, and a service account's token that lives for minutes and may do
//! one thing: ask for a client certificate. The joining host makes its key itself; the server approves the request if it
//! is for the host that the token was made for. With that certificate the host agent reads the platform's objects, runs the
//! machines placed on it and renews its lease.

mod approve;
mod join;
mod token;

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

pub use approve::run as approve;
pub use join::run as join;
pub use token::run as token;

use crate::paths::Paths;

/// Group of every host's identity at home, and the prefix of its user name.
const GROUP: &str = "oaks:hosts";
const USER: &str = "oaks:host:";
/// Namespace at home of join accounts, leases and machines' secrets.
const NAMESPACE: &str = "kube-system";

/// What a token says.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Invitation {
    /// Name of the host that may join.
    pub name: String,
    /// `https://192.0.2.1:6443`: home.
    pub server: String,
    pub ca_pem: String,
    pub token: String,
    pub public_pool: ipnet::Ipv4Net,
}

/// Begins every token, so that another text is told from a damaged one.
const PREFIX: &str = "oaks1.";

impl Invitation {
    fn print(&self) -> Result<String> {
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(self)?)))
    }

    fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        let coded = text
            .strip_prefix(PREFIX)
            .with_context(|| format!("this is no token of `oaks host token` (those begin with {PREFIX})"))?;
        let bytes = URL_SAFE_NO_PAD
            .decode(coded)
            .context("the token is damaged; paste the whole line")?;
        serde_json::from_slice(&bytes).context("the token is damaged or of another version of oaks")
    }
}

/// What a joined host remembers; its presence makes the instance one without a server.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Joined {
    pub name: String,
    pub underlay: std::net::Ipv4Addr,
    pub public_pool: ipnet::Ipv4Net,
}

impl Joined {
    /// `None` on a host that did not join another one's platform.
    pub fn read(paths: &Paths) -> Result<Option<Self>> {
        match std::fs::read(paths.joined()) {
            Ok(text) => Ok(Some(
                serde_json::from_slice(&text).with_context(|| format!("{} is damaged", paths.joined().display()))?,
            )),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("reading {}", paths.joined().display())),
        }
    }
}

/// The instance's long-running processes in the order of their start, without the keeper.
pub fn processes(paths: &Paths) -> &'static [&'static str] {
    if paths.joined().exists() {
        &["host"]
    } else {
        &["server", "host"]
    }
}

/// A host's name is the name of its object at home.
pub fn check_name(name: &str) -> Result<()> {
    let fine = (1..=40).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    ensure!(
        fine,
        "{name:?} is no name for a host: use 1 to 40 lower-case letters, digits and '-' inside"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_others_are_told_apart() {
        let invitation = Invitation {
            name: "b".into(),
            server: "https://192.0.2.1:6443".into(),
            ca_pem: "PEM".into(),
            token: "t".into(),
            public_pool: "198.19.0.0/16".parse().unwrap(),
        };
        let text = invitation.print().unwrap();
        assert_eq!(Invitation::parse(&format!(" {text}\n")).unwrap(), invitation);
        let refused = |text: &str| format!("{:#}", Invitation::parse(text).unwrap_err());
        assert!(refused("eyJhbGciOi").contains("no token of `oaks host token`"));
        assert!(refused(&text[..text.len() / 2]).contains("damaged"));
        assert!(refused(&format!("{PREFIX}e30")).contains("another version"));
        for bad in ["", "A", "-a", "a.b", &"a".repeat(41)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
