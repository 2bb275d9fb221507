//! A stored object: its JSON bytes with a gap for `resourceVersion`, and the few facts that reads need.
//!
//! The encoding always starts `{"apiVersion":..,"kind":..,"metadata":{` and never contains `resourceVersion`: the
//! store's revision is spliced in when bytes go out. So one encoding serves the store, single reads, lists and every
//! watcher, and no tree is kept.

use std::sync::{Arc, OnceLock};

use apimachinery::meta;
use bytes::Bytes;
use parking_lot::Mutex;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

/// What filters and deletion look at without parsing the object.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Empty for cluster-scoped objects.
    pub namespace: Box<str>,
    pub name: Box<str>,
    pub uid: Box<str>,
    pub generation: i64,
    /// Whether `deletionTimestamp` is set.
    pub deleting: bool,
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// Uids of the owners.
    pub owners: Box<[Box<str>]>,
    /// Values of the kind's selectable fields, in the order of [`crate::fields::selectable`].
    pub fields: Box<[Box<str>]>,
}

impl Header {
    /// Reads the header of an object of the resource whose selectable fields are `fields`.
    pub fn of(object: &Value, fields: &[&str]) -> Self {
        Header {
            namespace: meta::namespace(object).into(),
            name: meta::name(object).into(),
            uid: meta::uid(object).into(),
            generation: meta::generation(object),
            deleting: meta::deletion_timestamp(object).is_some(),
            labels: meta::labels(object).map(|(k, v)| (k.into(), v.into())).collect(),
            owners: meta::owner_references(object).map(|o| o.uid.into()).collect(),
            fields: fields.iter().map(|f| crate::fields::value(object, f).into()).collect(),
        }
    }
}

/// An encoded object before it has a revision; travels through the store as an attachment.
#[derive(Clone, Debug)]
pub struct Encoded {
    pub bytes: Bytes,
    /// Where `resourceVersion` goes: just after `"metadata":{`.
    splice: u32,
    /// Just after the `}` that closes metadata.
    metadata_end: u32,
    /// Schema of a custom kind under which these bytes were last checked (see [`crate::served::VersionSchema`]); 0 for
    /// built-in kinds, and for what was read back from the store.
    pub schema: u64,
    pub header: Arc<Header>,
}

const METADATA: &str = "\"metadata\":{";

impl Encoded {
    /// Encodes `object`, leaving `metadata.resourceVersion` out.
    pub fn new(object: &Value, fields: &[&str]) -> Self {
        let empty = Map::new();
        let root = object.as_object().unwrap_or(&empty);
        let mut out = Vec::with_capacity(1024);
        out.push(b'{');
        for key in ["apiVersion", "kind"] {
            if let Some(value) = root.get(key) {
                entry(&mut out, key, value);
                out.push(b',');
            }
        }
        out.extend_from_slice(METADATA.as_bytes());
        let splice = out.len();
        let mut first = true;
        for (key, value) in root.get("metadata").and_then(Value::as_object).unwrap_or(&empty) {
            if key == "resourceVersion" || key == "selfLink" {
                continue;
            }
            if !first {
                out.push(b',');
            }
            first = false;
            entry(&mut out, key, value);
        }
        out.push(b'}');
        let metadata_end = out.len();
        for (key, value) in root {
            if !matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
                out.push(b',');
                entry(&mut out, key, value);
            }
        }
        out.push(b'}');
        Encoded {
            bytes: out.into(),
            splice: splice as u32,
            metadata_end: metadata_end as u32,
            schema: 0,
            header: Arc::new(Header::of(object, fields)),
        }
    }

    /// Takes bytes back from the store. `None` if they are not an encoding of this module.
    pub fn recover(bytes: Bytes, fields: &[&str]) -> Option<Self> {
        let value: Value = serde_json::from_slice(&bytes).ok()?;
        let at = bytes.windows(METADATA.len()).position(|w| w == METADATA.as_bytes())?;
        let splice = at + METADATA.len();
        let mut metadata = serde_json::Deserializer::from_slice(&bytes[splice - 1..]).into_iter::<IgnoredAny>();
        metadata.next()?.ok()?;
        let metadata_end = splice - 1 + metadata.byte_offset();
        let header = Arc::new(Header::of(&value, fields));
        Some(Encoded {
            bytes,
            splice: splice as u32,
            metadata_end: metadata_end as u32,
            schema: 0,
            header,
        })
    }
}

fn entry(out: &mut Vec<u8>, key: &str, value: &Value) {
    // Writing into a Vec cannot fail, and neither can a tree of JSON values.
    let _ = serde_json::to_writer(&mut *out, key);
    out.push(b':');
    let _ = serde_json::to_writer(&mut *out, value);
}

/// A stored object at one revision.
#[derive(Debug)]
pub struct Object {
    /// Revision of its last write; 0 for an object that was never stored (dry run).
    pub rv: u64,
    pub encoded: Encoded,
    protobuf: OnceLock<Option<Bytes>>,
    /// The last form in which a version of a custom kind showed this object, if that is not these bytes.
    view: Mutex<Option<Arc<Object>>>,
}

impl Object {
    pub fn new(encoded: Encoded, rv: u64) -> Arc<Self> {
        Arc::new(Object {
            rv,
            encoded,
            protobuf: OnceLock::new(),
            view: Mutex::new(None),
        })
    }

    /// The same content at a later revision, as the event of its deletion carries it.
    pub fn at(&self, rv: u64) -> Arc<Self> {
        Object::new(self.encoded.clone(), rv)
    }

    /// The object under the schema `id`: itself if its bytes were checked under it, else what `make` says, kept for the
    /// next time.
    pub fn view(self: &Arc<Self>, id: u64, make: impl FnOnce() -> Encoded) -> Arc<Self> {
        if self.encoded.schema == id {
            return self.clone();
        }
        let mut kept = self.view.lock();
        if let Some(view) = kept.as_ref().filter(|v| v.encoded.schema == id) {
            return view.clone();
        }
        let mut encoded = make();
        if encoded.bytes == self.encoded.bytes {
            // Nothing to change, so nothing to keep twice.
            encoded.bytes = self.encoded.bytes.clone();
            encoded.header = self.encoded.header.clone();
        }
        let view = Object::new(encoded, self.rv);
        *kept = Some(view.clone());
        view
    }

    pub fn header(&self) -> &Header {
        &self.encoded.header
    }

    fn splice_version(&self, out: &mut Vec<u8>) {
        if self.rv == 0 {
            return;
        }
        let empty = self.encoded.bytes[self.encoded.splice as usize] == b'}';
        out.extend_from_slice(b"\"resourceVersion\":\"");
        out.extend_from_slice(self.rv.to_string().as_bytes());
        out.extend_from_slice(if empty { b"\"" } else { b"\"," });
    }

    /// Appends the whole object as JSON.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        let (head, tail) = self.encoded.bytes.split_at(self.encoded.splice as usize);
        out.extend_from_slice(head);
        self.splice_version(out);
        out.extend_from_slice(tail);
    }

    /// Appends the object as an item of a typed list: without `apiVersion` and `kind`.
    pub fn write_item(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(METADATA.as_bytes());
        self.splice_version(out);
        out.extend_from_slice(&self.encoded.bytes[self.encoded.splice as usize..]);
    }

    /// Appends the object's metadata as a `PartialObjectMetadata`.
    pub fn write_partial(&self, version: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"kind\":\"PartialObjectMetadata\",\"apiVersion\":\"meta.k8s.io/");
        out.extend_from_slice(version.as_bytes());
        out.extend_from_slice(b"\",");
        out.extend_from_slice(METADATA.as_bytes());
        self.splice_version(out);
        out.extend_from_slice(&self.encoded.bytes[self.encoded.splice as usize..self.encoded.metadata_end as usize]);
        out.push(b'}');
    }

    /// The object as JSON.
    pub fn json(&self) -> Bytes {
        let mut out = Vec::with_capacity(self.encoded.bytes.len() + 48);
        self.write_json(&mut out);
        out.into()
    }

    /// Parses the object, `resourceVersion` included. For writes and table cells, never for plain reads.
    pub fn value(&self) -> Value {
        // The bytes were produced or checked by `Encoded`, so they parse; a null object would fail later checks.
        let mut value: Value = serde_json::from_slice(&self.encoded.bytes).unwrap_or_default();
        if self.rv != 0
            && let Some(metadata) = meta::metadata_mut(&mut value)
        {
            metadata.insert("resourceVersion".into(), self.rv.to_string().into());
        }
        value
    }

    /// The protobuf encoding with its envelope, made by `make` at first use and shared by everyone afterwards.
    pub fn protobuf(&self, make: impl FnOnce(&Value) -> Option<Vec<u8>>) -> Option<Bytes> {
        self.protobuf
            .get_or_init(|| make(&self.value()).map(Bytes::from))
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn version_is_spliced_everywhere() {
        let pod = json!({"kind": "Pod", "apiVersion": "v1", "spec": {"nodeName": "n"},
            "metadata": {"name": "a", "namespace": "d", "resourceVersion": "3", "labels": {"x": "}\"{"}}});
        let encoded = Encoded::new(&pod, &["spec.nodeName"]);
        assert!(
            encoded
                .bytes
                .starts_with(b"{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{")
        );
        assert_eq!(&*encoded.header.fields[0], "n");
        let back = Encoded::recover(encoded.bytes.clone(), &["spec.nodeName"]).unwrap();
        assert_eq!((back.splice, back.metadata_end), (encoded.splice, encoded.metadata_end));
        assert_eq!(back.header, encoded.header);

        let object = Object::new(encoded, 17);
        let mut want = pod.clone();
        want["metadata"]["resourceVersion"] = "17".into();
        assert_eq!(serde_json::from_slice::<Value>(&object.json()).unwrap(), want);
        assert_eq!(object.value(), want);
        let mut item = Vec::new();
        object.write_item(&mut item);
        let item: Value = serde_json::from_slice(&item).unwrap();
        assert_eq!(item, json!({"metadata": want["metadata"], "spec": want["spec"]}));
        let mut partial = Vec::new();
        object.write_partial("v1", &mut partial);
        let partial: Value = serde_json::from_slice(&partial).unwrap();
        assert_eq!(partial["metadata"], want["metadata"]);
        assert_eq!(partial.as_object().unwrap().len(), 3);
    }

    #[test]
    fn dry_run_objects_have_no_version() {
        let object = Object::new(Encoded::new(&json!({"metadata": {}}), &[]), 0);
        assert_eq!(&object.json()[..], b"{\"metadata\":{}}");
        assert_eq!(
            &Object::new(object.encoded.clone(), 4).json()[..],
            b"{\"metadata\":{\"resourceVersion\":\"4\"}}"
        );
    }
}
