//! What a place in an object is to server-side apply: one field, or something with parts.

use serde_json::{Map, Value};

use crate::gvk::Gvk;
use crate::table::{Field, ListKind, Ty, TypeDef, TypeTable};

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape<'t> {
    /// A scalar, or an atomic map or list: owned and replaced as a whole.
    Leaf,
    Struct(&'t TypeDef),
    /// A map whose values have this type.
    Map(&'t Ty),
    /// A list of distinct scalars.
    Set,
    /// A list of objects told apart by these fields.
    Keyed(&'t Ty, &'t [Box<str>]),
    /// Without schema: objects are granular, everything else is one field.
    Any,
}

impl<'t> Shape<'t> {
    pub(super) fn of_kind(table: &'t TypeTable, gvk: &Gvk) -> Shape<'t> {
        table.kind_of(gvk).map_or(Shape::Any, |k| Shape::Struct(k.def))
    }

    fn of(table: &'t TypeTable, ty: &'t Ty, field: Option<&'t Field>) -> Shape<'t> {
        let atomic = field.is_some_and(|f| f.atomic_map);
        match ty {
            Ty::Object(id) => match table.ty(*id) {
                def if def.atomic || atomic => Shape::Leaf,
                def => Shape::Struct(def),
            },
            Ty::Map(_) if atomic => Shape::Leaf,
            Ty::Map(value) => Shape::Map(value),
            Ty::List(item) => match field.map(|f| (f.list, f)) {
                Some((ListKind::Set, _)) => Shape::Set,
                Some((ListKind::Map, f)) => Shape::Keyed(item, &f.list_keys),
                _ => Shape::Leaf,
            },
            Ty::Any | Ty::Json | Ty::SchemaOr(..) => Shape::Any,
            _ => Shape::Leaf,
        }
    }

    /// Shape of a field of an object of this shape, and whether the type declares it.
    pub(super) fn field(self, table: &'t TypeTable, name: &str) -> (Shape<'t>, Option<&'t Field>) {
        match self {
            Shape::Struct(def) => match def.field(name) {
                Some(field) => (Shape::of(table, &field.ty, Some(field)), Some(field)),
                None => (Shape::Any, None),
            },
            Shape::Map(value) => (Shape::of(table, value, None), None),
            _ => (Shape::Any, None),
        }
    }

    /// Shape of the items of a list of this shape.
    pub(super) fn item(self, table: &'t TypeTable) -> Shape<'t> {
        match self {
            Shape::Keyed(item, _) => Shape::of(table, item, None),
            _ => Shape::Leaf,
        }
    }

    /// Whether a value here has parts, given what it is.
    pub(super) fn parts(self, value: &Value) -> Parts {
        match (self, value) {
            (Shape::Struct(_) | Shape::Map(_) | Shape::Any, Value::Object(_)) => Parts::Fields,
            (Shape::Set | Shape::Keyed(..), Value::Array(_)) => Parts::Items,
            _ => Parts::None,
        }
    }

    /// Path element of a list's item.
    ///
    /// # Errors
    /// Why the item has none: no key field, or a value that cannot be in a set.
    pub(super) fn element(self, table: &TypeTable, item: &Value) -> Result<String, String> {
        let Shape::Keyed(ty, keys) = self else {
            return match item {
                Value::Object(_) => Err("associative list without keys has an element that's a map type".into()),
                Value::Array(_) => Err("not supported: associative list with lists as elements".into()),
                Value::Null => Err("associative list without keys has an element that's an explicit null".into()),
                scalar => Ok(format!("v:{scalar}")),
            };
        };
        let Value::Object(fields) = item else {
            return Err("associative list with keys may not have non-map elements".into());
        };
        let def = match ty {
            Ty::Object(id) => Some(table.ty(*id)),
            _ => None,
        };
        let mut found = Map::new();
        for key in keys {
            let default = || def.and_then(|d| d.field(key)).and_then(|f| f.default.as_ref());
            if let Some(value) = fields.get(&**key).or_else(default) {
                found.insert(key.to_string(), value.clone());
            }
        }
        if found.is_empty() {
            let keys: Vec<String> = keys.iter().map(|k| format!("{k:?}")).collect();
            return Err(format!(
                "associative list with keys has an element that omits all key fields [{}] (and doesn't have default values for any key fields)",
                keys.join(" ")
            ));
        }
        Ok(format!("k:{}", Value::Object(found)))
    }
}

/// How a value divides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parts {
    None,
    Fields,
    Items,
}
