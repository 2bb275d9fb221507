//! Image names as people and pods write them, made whole: `nginx` is `docker.io/library/nginx:latest`.

use oci_client::Reference;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum ReferenceError {
    #[error("{reference:?} is no image reference: {reason}")]
    Parse { reference: String, reason: String },
    #[error("{digest:?} is no sha256 digest")]
    Digest { digest: String },
}

/// A parsed name. Keys are what the store's table holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// `sha256:...`: an image id.
    Id(String),
    /// `registry/repository:tag`
    Tagged(String),
    /// `registry/repository@sha256:...`; a tag beside the digest is dropped, since the digest decides.
    Digested { name: String, digest: String },
}

impl Name {
    pub fn parse(reference: &str) -> Result<Self, ReferenceError> {
        if let Some(hex) = reference.strip_prefix("sha256:") {
            check_digest(reference)?;
            return Ok(Name::Id(format!("sha256:{hex}")));
        }
        let parsed = parse(reference)?;
        let repository = format!("{}/{}", parsed.registry(), parsed.repository());
        match parsed.digest() {
            Some(digest) => {
                check_digest(digest)?;
                Ok(Name::Digested {
                    name: format!("{repository}@{digest}"),
                    digest: digest.to_owned(),
                })
            }
            None => Ok(Name::Tagged(format!(
                "{repository}:{}",
                parsed.tag().unwrap_or("latest")
            ))),
        }
    }

    /// As in the store's table.
    pub fn key(self) -> String {
        match self {
            Name::Id(key) | Name::Tagged(key) | Name::Digested { name: key, .. } => key,
        }
    }
}

pub(crate) fn parse(reference: &str) -> Result<Reference, ReferenceError> {
    Reference::try_from(reference).map_err(|error| ReferenceError::Parse {
        reference: reference.to_owned(),
        reason: error.to_string(),
    })
}

/// `registry/repository` and tag of a tagged key.
pub(crate) fn split_tag(key: &str) -> Option<(&str, &str)> {
    let (repository, tag) = key.rsplit_once(':')?;
    (!tag.contains('/') && !key.contains('@')).then_some((repository, tag))
}

pub(crate) fn check_digest(digest: &str) -> Result<(), ReferenceError> {
    let valid = digest
        .strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')));
    if valid {
        Ok(())
    } else {
        Err(ReferenceError::Digest {
            digest: digest.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_whole() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (given, want) in [
            ("nginx", Name::Tagged("docker.io/library/nginx:latest".into())),
            ("nginx:1.27", Name::Tagged("docker.io/library/nginx:1.27".into())),
            ("team/app", Name::Tagged("docker.io/team/app:latest".into())),
            ("localhost:5000/app:x", Name::Tagged("localhost:5000/app:x".into())),
            (digest.as_str(), Name::Id(digest.clone())),
        ] {
            assert_eq!(Name::parse(given).unwrap(), want, "{given}");
        }
        let digested = Name::parse(&format!("nginx:1@{digest}")).unwrap();
        assert_eq!(digested.key(), format!("docker.io/library/nginx@{digest}"));
        for bad in ["", "UPPER", "a b", "sha256:xyz", "nginx:", "../x"] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(split_tag("localhost:5000/app:x"), Some(("localhost:5000/app", "x")));
    }
}
