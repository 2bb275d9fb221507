//! The type table: every known kind's fields, wire numbers and merge rules, and every served resource.
//!
//! The built-in part is read once per process from generated data (`cargo xtask codegen types`); an overlay adds kinds at
//! run time (the platform's own, and those of CustomResourceDefinitions). Tables are immutable: adding kinds makes a new
//! table on top of the one before, which both share.

mod data;
mod overlay;
mod served;
mod types;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use serde_json::Value;

use crate::gvk::{Gvk, api_version, split_api_version};
use crate::structural::{CompileError, Structural};
pub use types::{Field, ListKind, SchemaOr, Ty, TypeDef, TypeId};

/// Release whose API the table describes, with its leading `v`.
pub const KUBERNETES_VERSION: &str = "v1.36.4";

/// An additional kind, served beside the built-in ones.
#[derive(Clone, Debug)]
pub struct KindDef {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub singular: String,
    pub namespaced: bool,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    /// Columns between NAME and AGE; AGE is added when none is given.
    pub columns: Vec<PrinterColumn>,
    /// OpenAPI v3 schema of the whole object (as in a CRD's `openAPIV3Schema`); `null` keeps every field as sent.
    pub schema: Arc<Value>,
    pub status_subresource: bool,
    /// What a definition may say beyond that; `KindMore::default()` for none of it.
    pub more: KindMore,
}

/// The rarer parts of a custom kind.
#[derive(Clone, Debug, Default)]
pub struct KindMore {
    /// Kind of lists; empty: the kind with `List`.
    pub list_kind: String,
    pub scale: Option<ScalePaths>,
    /// Paths of fields that selectors may name: `spec.color`.
    pub selectable: Vec<String>,
    /// Warning that every use of this version gets.
    pub deprecation: Option<String>,
    /// The schema, where it is compiled already.
    pub compiled: Option<Arc<Structural>>,
    /// Version that objects are stored at, if it is another one.
    pub storage_version: Option<String>,
}

/// Where a custom kind has what its `scale` subresource shows; paths such as `spec.replicas`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScalePaths {
    pub spec_replicas: String,
    pub status_replicas: String,
    /// A text field with a selector.
    pub selector: Option<String>,
}

/// A column read from the object by a path.
#[derive(Clone, Debug, PartialEq)]
pub struct PrinterColumn {
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub ty: String,
    /// Path as in a CRD: `.spec.replicas`, `.status.conditions[?(@.type=="Ready")].status`.
    pub json_path: String,
    /// 0 is always shown, 1 only by `-o wide`.
    pub priority: i32,
    pub format: String,
    pub description: String,
}

/// One served resource.
#[derive(Clone, Debug)]
pub struct ResourceInfo {
    pub group: String,
    pub version: String,
    pub plural: String,
    pub singular: String,
    pub kind: String,
    pub gvk: Gvk,
    /// Type of the object; `None` never occurs for served resources.
    pub ty: TypeId,
    pub namespaced: bool,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub verbs: Vec<String>,
    pub subresources: Vec<Subresource>,
    /// Columns of an overlay kind; built-in kinds have theirs in [`crate::columns`].
    pub columns: Vec<PrinterColumn>,
    /// Whether this is an overlay kind: JSON and YAML only, no strategic merge.
    pub custom: bool,
    /// Kind of a list of these objects.
    pub list_kind: String,
    /// Of an overlay kind that has a `scale` subresource.
    pub scale: Option<ScalePaths>,
    /// Of an overlay kind: paths of fields that selectors may name.
    pub selectable: Vec<String>,
    /// Warning for users of a deprecated version of an overlay kind.
    pub deprecation: Option<String>,
    /// Of an overlay kind: the version that objects are stored at, if it is another one.
    pub storage_version: Option<String>,
}

/// A subresource of a served resource.
#[derive(Clone, Debug)]
pub struct Subresource {
    pub name: String,
    /// Kind that the subresource exchanges (`Scale`, `Eviction`, or the parent's own).
    pub kind: Gvk,
    pub verbs: Vec<String>,
}

impl ResourceInfo {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// `deployments.apps`; `pods` in the core group. As messages name resources.
    pub fn group_resource(&self) -> String {
        if self.group.is_empty() {
            self.plural.clone()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// Kind of a list of these objects.
    pub fn list_kind(&self) -> String {
        self.list_kind.clone()
    }

    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }
}

/// A kind's place in a table.
#[derive(Clone, Copy, Debug)]
pub struct KindRef<'t> {
    pub id: TypeId,
    pub def: &'t TypeDef,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct TypeTable {
    types: Vec<Arc<TypeDef>>,
    by_name: HashMap<Box<str>, TypeId>,
    by_kind: HashMap<Gvk, TypeId>,
    /// Served resources, ordered by group (core first, then as upstream lists them), version and plural.
    resources: Vec<Arc<ResourceInfo>>,
    /// The table this one was made from: its types come first.
    base: Option<Arc<TypeTable>>,
    by_plural: HashMap<(String, String, String), usize>,
}

static BUILTIN: LazyLock<Arc<TypeTable>> = LazyLock::new(|| Arc::new(data::load()));

/// Kinds of the machinery that may come with any group and version.
const ANYWHERE: [&str; 6] = [
    "CreateOptions",
    "DeleteOptions",
    "ListOptions",
    "PatchOptions",
    "Status",
    "UpdateOptions",
];

/// Definition prefix of CustomResourceDefinition's types.
pub(crate) const EXTENSIONS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.";
/// Definition prefix of meta/v1.
pub(crate) const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

impl TypeTable {
    /// The built-in kinds; read from the generated data at the first call, shared afterwards.
    pub fn builtin() -> Arc<TypeTable> {
        BUILTIN.clone()
    }

    /// This table and `kinds`. A kind whose group, version and plural are already there replaces the earlier one.
    ///
    /// # Errors
    /// A kind whose schema cannot be compiled, with the reason.
    pub fn with_kinds(self: &Arc<Self>, kinds: Vec<KindDef>) -> Result<Arc<TypeTable>, (Gvk, CompileError)> {
        self.layer(kinds, overlay::Depth::Full, self.resources.clone())
    }

    /// As [`TypeTable::with_kinds`], where the kinds' own types have no parts: enough for discovery, documents and
    /// decoding, and cheap to make anew whenever a kind comes or goes. What walks objects by type takes the table of
    /// [`TypeTable::with_type`].
    ///
    /// # Errors
    /// As [`TypeTable::with_kinds`].
    pub fn with_shallow(self: &Arc<Self>, kinds: Vec<KindDef>) -> Result<Arc<TypeTable>, (Gvk, CompileError)> {
        self.layer(kinds, overlay::Depth::Shallow, self.resources.clone())
    }

    /// The types of this table and one kind's in full, and no resource but this kind's.
    ///
    /// # Errors
    /// As [`TypeTable::with_kinds`].
    pub fn with_type(self: &Arc<Self>, kind: &KindDef) -> Result<Arc<TypeTable>, (Gvk, CompileError)> {
        self.layer(vec![kind.clone()], overlay::Depth::Full, Vec::new())
    }

    fn layer(
        self: &Arc<Self>,
        kinds: Vec<KindDef>,
        depth: overlay::Depth,
        resources: Vec<Arc<ResourceInfo>>,
    ) -> Result<Arc<TypeTable>, (Gvk, CompileError)> {
        let mut table = TypeTable {
            types: Vec::new(),
            by_name: HashMap::new(),
            by_kind: HashMap::new(),
            base: Some(self.clone()),
            resources,
            by_plural: HashMap::new(),
        };
        for kind in kinds {
            overlay::add(&mut table, kind, depth)?;
        }
        table.index();
        Ok(Arc::new(table))
    }

    /// The table that this one lies on.
    pub fn base(&self) -> Option<&Arc<TypeTable>> {
        self.base.as_ref()
    }

    fn index(&mut self) {
        self.by_plural = self
            .resources
            .iter()
            .enumerate()
            .map(|(i, r)| ((r.group.clone(), r.version.clone(), r.plural.clone()), i))
            .collect();
    }

    /// Number of types that are the base's.
    fn base_types(&self) -> usize {
        self.base.as_ref().map_or(0, |b| b.base_types() + b.types.len())
    }

    fn push(&mut self, def: TypeDef) -> TypeId {
        let id = TypeId((self.base_types() + self.types.len()) as u32);
        self.by_name.insert(def.name.clone(), id);
        if let Some(gvk) = &def.gvk {
            self.by_kind.insert(gvk.clone(), id);
        }
        self.types.push(Arc::new(def));
        id
    }

    /// The served resource of that name.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<&ResourceInfo> {
        let key = (group.to_owned(), version.to_owned(), plural.to_owned());
        self.by_plural.get(&key).map(|i| &*self.resources[*i])
    }

    /// Every served resource.
    pub fn resources(&self) -> impl Iterator<Item = &ResourceInfo> {
        self.resources.iter().map(|r| &**r)
    }

    /// The served resource whose objects are of that kind.
    pub fn resource_of_kind(&self, gvk: &Gvk) -> Option<&ResourceInfo> {
        self.resources().find(|r| r.gvk == *gvk)
    }

    /// A kind's type. Options and Status are found under every group and version.
    pub fn kind(&self, group: &str, version: &str, kind: &str) -> Option<KindRef<'_>> {
        self.kind_of(&Gvk::new(group, version, kind))
    }

    /// As [`TypeTable::kind`], by [`Gvk`].
    pub fn kind_of(&self, gvk: &Gvk) -> Option<KindRef<'_>> {
        if let Some(id) = self.own_kind(gvk) {
            return Some(KindRef { id, def: self.ty(id) });
        }
        let meta = |name: &str| self.ty_named(&format!("{META}{name}"));
        let id = match &*gvk.kind {
            k if ANYWHERE.contains(&k) => meta(k)?,
            k @ ("PartialObjectMetadata" | "PartialObjectMetadataList") if &*gvk.group == "meta.k8s.io" => meta(k)?,
            "List" if gvk.group.is_empty() && &*gvk.version == "v1" => meta("List")?,
            _ => return None,
        };
        Some(KindRef { id, def: self.ty(id) })
    }

    fn own_kind(&self, gvk: &Gvk) -> Option<TypeId> {
        let found = self.by_kind.get(gvk).copied();
        found.or_else(|| self.base.as_ref()?.own_kind(gvk))
    }

    /// The type an object claims to be.
    pub fn kind_of_object(&self, object: &Value) -> Option<KindRef<'_>> {
        let kind = object.get("kind")?.as_str()?;
        let (group, version) = split_api_version(object.get("apiVersion")?.as_str()?);
        self.kind(group, version, kind)
    }

    /// A type by its place. Panics if `id` is of another table.
    pub fn ty(&self, id: TypeId) -> &TypeDef {
        let base = self.base_types();
        match (id.0 as usize).checked_sub(base) {
            Some(own) => &self.types[own],
            None => self
                .base
                .as_ref()
                .expect("types below the first own one are the base's")
                .ty(id),
        }
    }

    /// A type by its OpenAPI definition name.
    pub fn ty_named(&self, name: &str) -> Option<TypeId> {
        let found = self.by_name.get(name).copied();
        found.or_else(|| self.base.as_ref()?.ty_named(name))
    }

    /// Number of types; their ids are `0..count`.
    pub fn type_ids(&self) -> impl Iterator<Item = TypeId> + use<> {
        (0..(self.base_types() + self.types.len()) as u32).map(TypeId)
    }
}

#[cfg(test)]
mod tests;
