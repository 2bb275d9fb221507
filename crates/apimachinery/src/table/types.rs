//! What the table knows of one type.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use crate::gvk::Gvk;
use crate::structural::Structural;

/// Place of a type in its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(pub(crate) u32);

/// Type of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Ty {
    String,
    Bool,
    Int32,
    Int64,
    Double,
    /// Base64 text in JSON.
    Bytes,
    /// Number or text.
    IntOrString,
    /// Text, or a number that becomes text.
    Quantity,
    /// RFC 3339, seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    /// Go duration text.
    Duration,
    /// A field set of managedFields: an object, opaque.
    Fields,
    /// A whole object of any kind.
    Raw,
    /// A list of text that is a message of its own in protobuf.
    Strings,
    /// Anything (custom kinds with preserved unknown fields).
    Any,
    /// Anything, as a message of raw JSON in protobuf.
    Json,
    /// A schema (of this type), or something simpler in its place.
    SchemaOr(SchemaOr, TypeId),
    Object(TypeId),
    List(Box<Ty>),
    Map(Box<Ty>),
}

/// What may stand where a schema could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchemaOr {
    Array,
    Bool,
    Strings,
}

/// How a list merges (`x-kubernetes-list-type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ListKind {
    #[default]
    Unset,
    Atomic,
    Set,
    Map,
}

/// One field.
#[derive(Clone, Debug)]
pub struct Field {
    pub name: Box<str>,
    pub ty: Ty,
    /// Protobuf field number within its message.
    pub proto: Option<u32>,
    /// Number of the embedded message that holds the field on the protobuf wire (JSON inlines it).
    pub embedded_in: Option<u32>,
    pub required: bool,
    /// Absent and zero differ.
    pub pointer: bool,
    /// Left out of JSON when zero.
    pub omitempty: bool,
    pub list: ListKind,
    pub list_keys: Vec<Box<str>>,
    pub merge_key: Option<Box<str>>,
    pub patch_merge: bool,
    pub patch_retain_keys: bool,
    /// The map is replaced as a whole by server-side apply.
    pub atomic_map: bool,
    pub default: Option<Value>,
}

impl Field {
    pub(crate) fn new(name: &str, ty: Ty) -> Field {
        Field {
            name: name.into(),
            ty,
            proto: None,
            embedded_in: None,
            required: false,
            pointer: false,
            omitempty: true,
            list: ListKind::Unset,
            list_keys: Vec::new(),
            merge_key: None,
            patch_merge: false,
            patch_retain_keys: false,
            atomic_map: false,
            default: None,
        }
    }

    /// `x-kubernetes-patch-strategy`, if any.
    pub fn patch_strategy(&self) -> Option<&'static str> {
        match (self.patch_merge, self.patch_retain_keys) {
            (true, true) => Some("merge,retainKeys"),
            (true, false) => Some("merge"),
            (false, true) => Some("retainKeys"),
            (false, false) => None,
        }
    }
}

/// One object type.
#[derive(Clone, Debug)]
pub struct TypeDef {
    /// OpenAPI definition name (`io.k8s.api.core.v1.Pod`).
    pub name: Box<str>,
    pub gvk: Option<Gvk>,
    /// Fields in source order.
    pub fields: Vec<Field>,
    by_name: HashMap<Box<str>, u16>,
    pub atomic: bool,
    /// Unknown fields are kept (custom kinds).
    pub preserve_unknown: bool,
    /// The schema of a custom kind, as given.
    pub schema: Option<Arc<Value>>,
    /// The same schema, compiled.
    pub structural: Option<Arc<Structural>>,
}

impl TypeDef {
    pub(crate) fn new(name: &str, gvk: Option<Gvk>, fields: Vec<Field>) -> TypeDef {
        let by_name = fields
            .iter()
            .enumerate()
            .map(|(i, f)| (f.name.clone(), i as u16))
            .collect();
        TypeDef {
            name: name.into(),
            gvk,
            fields,
            by_name,
            atomic: false,
            preserve_unknown: false,
            schema: None,
            structural: None,
        }
    }

    /// A field by its JSON name, case-sensitive.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.by_name.get(name).map(|i| &self.fields[*i as usize])
    }

    /// Last part of the definition name: `Pod`.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }
}
