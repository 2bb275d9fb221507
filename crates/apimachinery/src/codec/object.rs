//! The typed reader: a serde seed that walks the table beside the input.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{PROBLEMS_MAX, scalar};
use crate::table::{SchemaOr, Ty, TypeDef, TypeId, TypeTable};

/// Most values in one object, whatever its length in bytes.
const VALUES_MAX: usize = 1_000_000;

/// Shared state of one decoding.
pub(super) struct Context<'t> {
    table: &'t TypeTable,
    path: RefCell<Vec<Segment>>,
    values: Cell<usize>,
    /// Whether duplicates count in content without a type too: inside custom kinds.
    untyped_duplicates: Cell<bool>,
    /// Unknown and duplicate fields, in input order.
    pub problems: RefCell<Vec<String>>,
    /// Text of the type error that ended the reading.
    pub fatal: Cell<Option<String>>,
}

enum Segment {
    Field(String),
    Key(String),
    Index(usize),
}

impl<'t> Context<'t> {
    pub fn new(table: &'t TypeTable) -> Context<'t> {
        Context {
            table,
            path: RefCell::default(),
            values: Cell::new(0),
            untyped_duplicates: Cell::new(false),
            problems: RefCell::default(),
            fatal: Cell::new(None),
        }
    }

    pub fn seed(&self, id: TypeId) -> Seed<'_> {
        Seed {
            ctx: self,
            ty: Expect::Object(id),
            owner: "",
        }
    }

    /// `spec.containers[0].name`
    fn path(&self) -> String {
        let mut out = String::new();
        for segment in self.path.borrow().iter() {
            match segment {
                Segment::Field(s) | Segment::Key(s) => {
                    if !out.is_empty() {
                        out.push('.');
                    }
                    out.push_str(s);
                }
                Segment::Index(i) => out.push_str(&format!("[{i}]")),
            }
        }
        out
    }

    /// Path of field names only, as type errors show it.
    fn field_path(&self) -> String {
        let path = self.path.borrow();
        let names: Vec<&str> = path
            .iter()
            .filter_map(|s| {
                if let Segment::Field(f) = s {
                    Some(f.as_str())
                } else {
                    None
                }
            })
            .collect();
        names.join(".")
    }

    fn problem(&self, what: &str, name: &str) {
        let mut problems = self.problems.borrow_mut();
        if problems.len() < PROBLEMS_MAX {
            let path = self.path();
            let dot = if path.is_empty() { "" } else { "." };
            problems.push(format!("{what} field \"{path}{dot}{name}\""));
        }
    }

    fn fail<E: serde::de::Error>(&self, detail: String) -> E {
        self.fatal.set(Some(detail));
        E::custom("wrong type")
    }
}

#[derive(Clone, Copy)]
enum Expect<'t> {
    Object(TypeId),
    Ty(&'t Ty),
    /// Untyped content, kept as it is.
    Any,
}

/// Reads one value of an expected type.
pub(super) struct Seed<'c> {
    ctx: &'c Context<'c>,
    ty: Expect<'c>,
    /// Short name of the type that holds the field being read.
    owner: &'c str,
}

impl<'c> Seed<'c> {
    fn with(&self, ty: Expect<'c>) -> Seed<'c> {
        Seed {
            ctx: self.ctx,
            ty,
            owner: self.owner,
        }
    }

    fn expect(&self) -> Expect<'c> {
        match self.ty {
            Expect::Ty(Ty::Object(id)) => Expect::Object(*id),
            Expect::Ty(Ty::Any | Ty::Raw | Ty::Fields | Ty::Json) => Expect::Any,
            other => other,
        }
    }

    fn mismatch<E: serde::de::Error>(&self, found: &str) -> E {
        let path = self.ctx.field_path();
        let ty = go_type(self.ctx.table, self.ty);
        let place = if path.is_empty() {
            format!("Go value of type {ty}")
        } else {
            format!("Go struct field {}.{path} of type {ty}", self.owner)
        };
        self.ctx.fail(format!("json: cannot unmarshal {found} into {place}"))
    }

    fn scalar<E: serde::de::Error>(&self, text: &str) -> Result<Value, E> {
        let Expect::Ty(ty) = self.expect() else {
            return match self.expect() {
                Expect::Any => Ok(Value::String(text.to_owned())),
                _ => Err(self.mismatch("string")),
            };
        };
        match scalar::from_text(ty, text) {
            Some(Ok(value)) => Ok(value),
            Some(Err(detail)) => Err(self.ctx.fail(detail)),
            None => Err(self.mismatch("string")),
        }
    }

    fn number<E: serde::de::Error>(&self, number: Number) -> Result<Value, E> {
        let wrong = |n: &Number| self.mismatch(&format!("number {n}"));
        match self.expect() {
            Expect::Any => Ok(Value::Number(number)),
            Expect::Object(_) => Err(self.mismatch("number")),
            Expect::Ty(ty) => match ty {
                Ty::Int32 | Ty::IntOrString => match number.as_i64() {
                    Some(n) if i32::try_from(n).is_ok() => Ok(Value::Number(number)),
                    _ => Err(wrong(&number)),
                },
                Ty::Int64 if number.as_i64().is_some() => Ok(Value::Number(number)),
                Ty::Int64 => Err(wrong(&number)),
                Ty::Double => Ok(number.as_f64().map_or(Value::Null, scalar::double)),
                Ty::Quantity => match scalar::from_text(ty, &number.to_string()) {
                    Some(Ok(value)) => Ok(value),
                    Some(Err(detail)) => Err(self.ctx.fail(detail)),
                    None => Err(wrong(&number)),
                },
                _ => Err(self.mismatch("number")),
            },
        }
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let values = self.ctx.values.get() + 1;
        self.ctx.values.set(values);
        if values > VALUES_MAX {
            return Err(D::Error::custom(format_args!("more than {VALUES_MAX} values")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: serde::de::Error>(self, v: bool) -> Result<Value, E> {
        match self.expect() {
            Expect::Any | Expect::Ty(Ty::Bool | Ty::SchemaOr(SchemaOr::Bool, _)) => Ok(Value::Bool(v)),
            _ => Err(self.mismatch("bool")),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<Value, E> {
        self.number(v.into())
    }

    fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<Value, E> {
        self.number(v.into())
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        if matches!(self.expect(), Expect::Any) && v.is_finite() {
            return Ok(scalar::double(v));
        }
        match Number::from_f64(v) {
            Some(n) => self.number(n),
            None => Err(E::custom("number is not finite")),
        }
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<Value, E> {
        self.scalar(v)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let item = match self.expect() {
            Expect::Any => Expect::Any,
            Expect::Ty(Ty::List(item)) => Expect::Ty(item),
            Expect::Ty(Ty::Strings | Ty::SchemaOr(SchemaOr::Strings, _)) => Expect::Ty(&Ty::String),
            Expect::Ty(Ty::SchemaOr(SchemaOr::Array, schema)) => Expect::Object(*schema),
            _ => return Err(self.mismatch("array")),
        };
        let mut out = Vec::new();
        loop {
            self.ctx.path.borrow_mut().push(Segment::Index(out.len()));
            let next = seq.next_element_seed(self.with(item))?;
            self.ctx.path.borrow_mut().pop();
            match next {
                // A null element is the zero value of its type.
                Some(Value::Null) if !matches!(item, Expect::Any) => out.push(zero(item)),
                Some(value) => out.push(value),
                None => return Ok(Value::Array(out)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        let (def, value): (Option<&TypeDef>, Expect<'_>) = match self.expect() {
            Expect::Any => (None, Expect::Any),
            Expect::Object(id) => (Some(self.ctx.table.ty(id)), Expect::Any),
            Expect::Ty(Ty::SchemaOr(_, schema)) => (Some(self.ctx.table.ty(*schema)), Expect::Any),
            Expect::Ty(Ty::Map(value)) => (None, Expect::Ty(value)),
            Expect::Ty(_) => return Err(self.mismatch("object")),
        };
        while let Some(key) = map.next_key::<Key>()? {
            let key = key.0;
            let typed = !matches!(self.expect(), Expect::Any) || self.ctx.untyped_duplicates.get();
            if typed && out.contains_key(&key) {
                self.ctx.problem("duplicate", &key);
            }
            let (expect, owner, segment) = match def {
                None => (value, self.owner, Segment::Key(key.clone())),
                // What a custom kind holds is checked against its schema afterwards, as a whole.
                Some(def)
                    if def.structural.is_some() && !matches!(key.as_str(), "apiVersion" | "kind" | "metadata") =>
                {
                    self.ctx.untyped_duplicates.set(true);
                    (Expect::Any, self.owner, Segment::Field(key.clone()))
                }
                Some(def) => match def.field(&key) {
                    Some(field) => (Expect::Ty(&field.ty), def.short_name(), Segment::Field(key.clone())),
                    None => {
                        if !def.preserve_unknown {
                            self.ctx.problem("unknown", &key);
                        }
                        (Expect::Any, def.short_name(), Segment::Field(key.clone()))
                    }
                },
            };
            self.ctx.path.borrow_mut().push(segment);
            let read = map.next_value_seed(Seed {
                ctx: self.ctx,
                ty: expect,
                owner,
            })?;
            self.ctx.path.borrow_mut().pop();
            let open = |d: &TypeDef| d.preserve_unknown || d.structural.is_some();
            let keep = def.is_none_or(|d| open(d) || d.field(&key).is_some());
            if !keep {
                continue;
            }
            match read {
                // Null means absent; in a typed map it is the zero value.
                Value::Null if def.is_some_and(|d| !nulls(d, &key) && d.field(&key).is_some()) => {
                    drop(out.remove(&key))
                }
                Value::Null if typed && def.is_none() => drop(out.insert(key, zero(value))),
                read => drop(out.insert(key, read)),
            }
        }
        Ok(Value::Object(out))
    }
}

/// Whether a field of an object of this type may be null: the content of custom kinds.
fn nulls(def: &TypeDef, key: &str) -> bool {
    def.structural.is_some() && !matches!(key, "apiVersion" | "kind" | "metadata")
}

/// A map key: YAML's numbers and booleans become text.
struct Key(String);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a key of text")
            }
            fn visit_str<E>(self, v: &str) -> Result<Key, E> {
                Ok(Key(v.to_owned()))
            }
            fn visit_string<E>(self, v: String) -> Result<Key, E> {
                Ok(Key(v))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

fn zero(expect: Expect<'_>) -> Value {
    match expect {
        Expect::Any => Value::Null,
        Expect::Object(_) => Value::Object(Map::new()),
        Expect::Ty(ty) => match ty {
            Ty::String | Ty::Bytes => "".into(),
            Ty::Quantity => "0".into(),
            Ty::Bool => false.into(),
            Ty::Int32 | Ty::Int64 | Ty::Double | Ty::IntOrString => 0.into(),
            Ty::List(_) | Ty::Strings => Value::Array(Vec::new()),
            Ty::Object(_) | Ty::Map(_) => Value::Object(Map::new()),
            Ty::Time | Ty::MicroTime | Ty::Duration | Ty::Fields | Ty::Raw | Ty::Any | Ty::Json | Ty::SchemaOr(..) => {
                Value::Null
            }
        },
    }
}

/// The type's name as type errors show it.
fn go_type(table: &TypeTable, expect: Expect<'_>) -> String {
    match expect {
        Expect::Any => "interface {}".into(),
        Expect::Object(id) => {
            let name = &table.ty(id).name;
            let mut parts = name.rsplit('.');
            match (parts.next(), parts.next()) {
                (Some(kind), Some(version)) => format!("{version}.{kind}"),
                _ => name.to_string(),
            }
        }
        Expect::Ty(ty) => match ty {
            Ty::String => "string".into(),
            Ty::Bool => "bool".into(),
            Ty::Int32 => "int32".into(),
            Ty::Int64 => "int64".into(),
            Ty::Double => "float64".into(),
            Ty::Bytes => "[]uint8".into(),
            Ty::IntOrString => "intstr.IntOrString".into(),
            Ty::Quantity => "resource.Quantity".into(),
            Ty::Time => "v1.Time".into(),
            Ty::MicroTime => "v1.MicroTime".into(),
            Ty::Duration => "v1.Duration".into(),
            Ty::Fields => "v1.FieldsV1".into(),
            Ty::Raw => "runtime.RawExtension".into(),
            Ty::Strings => "[]string".into(),
            Ty::Any => "interface {}".into(),
            Ty::Json => "v1.JSON".into(),
            Ty::SchemaOr(SchemaOr::Array, _) => "v1.JSONSchemaPropsOrArray".into(),
            Ty::SchemaOr(SchemaOr::Bool, _) => "v1.JSONSchemaPropsOrBool".into(),
            Ty::SchemaOr(SchemaOr::Strings, _) => "v1.JSONSchemaPropsOrStringArray".into(),
            Ty::Object(id) => go_type(table, Expect::Object(*id)),
            Ty::List(item) => format!("[]{}", go_type(table, Expect::Ty(item))),
            Ty::Map(value) => format!("map[string]{}", go_type(table, Expect::Ty(value))),
        },
    }
}
