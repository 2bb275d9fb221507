//! Secrets are encrypted where they are stored: AES-256-GCM with the cluster's own key, bound to the object's key.
//!
//! Memory holds them in the clear, as it must to serve them; the store and whoever reads its files see sealed values.

use bytes::Bytes;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

/// First bytes of a sealed value; an object's encoding starts with `{`.
const MAGIC: &[u8] = b"\x00s1";
/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// Why a value cannot be sealed or opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SealError {
    #[error("the key for secrets is not 32 bytes")]
    Key,
    #[error("the sealed value is damaged, or sealed with another key")]
    Open,
    #[error("sealing a value failed")]
    Seal,
}

/// The cluster's key.
pub struct Sealer {
    key: LessSafeKey,
    random: SystemRandom,
}

impl Sealer {
    pub fn new(key: &[u8]) -> Result<Self, SealError> {
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| SealError::Key)?;
        Ok(Sealer {
            key: LessSafeKey::new(key),
            random: SystemRandom::new(),
        })
    }

    /// A new random key.
    pub fn generate() -> Result<[u8; KEY_BYTES], SealError> {
        let mut key = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut key).map_err(|_| SealError::Seal)?;
        Ok(key)
    }

    /// Whether values under the store key are sealed.
    pub fn covers(key: &[u8]) -> bool {
        key.starts_with(b"o//secrets/")
    }

    /// Seals `value` for `key`. Random nonces are safe for 2^32 writes of one cluster's secrets.
    pub fn seal(&self, key: &[u8], value: &[u8]) -> Result<Bytes, SealError> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| SealError::Seal)?;
        let mut body = value.to_vec();
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(key), &mut body)
            .map_err(|_| SealError::Seal)?;
        Ok([MAGIC, &nonce, &body].concat().into())
    }

    /// Opens a value; one that was never sealed is returned as it is.
    pub fn open(&self, key: &[u8], value: Bytes) -> Result<Bytes, SealError> {
        let Some(rest) = value.strip_prefix(MAGIC) else {
            return Ok(value);
        };
        let (nonce, body) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Open)?;
        let mut body = body.to_vec();
        let opened = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(key), &mut body)
            .map_err(|_| SealError::Open)?;
        Ok(Bytes::copy_from_slice(opened))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_values_open_in_their_place_only() {
        let sealer = Sealer::new(&Sealer::generate().unwrap()).unwrap();
        let sealed = sealer.seal(b"o//secrets/d/a", b"{\"data\":1}").unwrap();
        assert!(!sealed.windows(4).any(|w| w == b"data"));
        assert_eq!(
            sealer.open(b"o//secrets/d/a", sealed.clone()).unwrap(),
            &b"{\"data\":1}"[..]
        );
        assert_eq!(sealer.open(b"o//secrets/d/b", sealed.clone()), Err(SealError::Open));
        let other = Sealer::new(&Sealer::generate().unwrap()).unwrap();
        assert_eq!(other.open(b"o//secrets/d/a", sealed), Err(SealError::Open));
        assert_eq!(sealer.open(b"x", Bytes::from_static(b"{}")).unwrap(), &b"{}"[..]);
    }
}
