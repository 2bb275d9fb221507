//! Structural schemas: what a custom kind's OpenAPI v3 schema means for its objects.
//!
//! A schema is compiled once ([`Structural::compile`]) and then walks objects: [`Structural::prune`] drops fields it does
//! not name, [`Structural::default`] fills in, [`Structural::check`] says what is wrong in upstream's words. Whether a
//! schema is structural at all is [`crate::validate`]'s question about the definition; here anything that compiles works.
//!
//! # Source
//! `k8s.io/apiextensions-apiserver/pkg/apiserver/schema` and `k8s.io/kube-openapi/pkg/validation`, 0.36 (behaviour only).

mod check;
mod defaulting;
mod embedded;
mod formats;
mod lists;
mod pattern;
mod prune;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::table::ListKind;
pub(crate) use formats::Format;
pub(crate) use pattern::Pattern;

/// Deepest nesting of a schema; upstream's parsers end at 128 and more levels of JSON too.
pub const DEPTH_MAX: usize = 100;
/// Most nodes of one schema. The largest published definitions have some 30,000.
pub const NODES_MAX: usize = 200_000;

/// Fields that every object has, whatever its schema says.
const META_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// A schema that cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    #[error("schema is nested deeper than {DEPTH_MAX} levels")]
    TooDeep,
    #[error("schema has more than {NODES_MAX} parts")]
    TooLarge,
    /// The expression, and why it is refused.
    #[error("pattern {pattern:?} is not usable: {reason}")]
    Pattern { pattern: String, reason: String },
}

/// Type names of a value, as messages list them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Type {
    /// Any type will do.
    #[default]
    Any,
    Object,
    Array,
    String,
    Integer,
    Number,
    Boolean,
    IntOrString,
    /// A name that is none of these: nothing fits it.
    Unknown,
}

impl Type {
    fn of(schema: &Value) -> Type {
        if schema["x-kubernetes-int-or-string"] == true {
            return Type::IntOrString;
        }
        match schema["type"].as_str().unwrap_or_default() {
            "" => Type::Any,
            "object" => Type::Object,
            "array" => Type::Array,
            "string" => Type::String,
            "integer" => Type::Integer,
            "number" => Type::Number,
            "boolean" => Type::Boolean,
            _ => Type::Unknown,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Type::Any => "",
            Type::Object => "object",
            Type::Array => "array",
            Type::String => "string",
            Type::Integer => "integer",
            Type::Number => "number",
            Type::Boolean => "boolean",
            Type::IntOrString => "integer,string",
            Type::Unknown => "unknown",
        }
    }
}

/// What fields beside the named ones are.
#[derive(Debug, Default)]
enum Additional {
    #[default]
    Unset,
    /// `true`: anything, though objects in it have no fields of their own.
    Allowed,
    Forbidden,
    Schema(Box<Node>),
}

/// Checks of values that most nodes do not have.
#[derive(Debug, Default)]
struct Rules {
    format: Option<Format>,
    maximum: Option<f64>,
    exclusive_maximum: bool,
    minimum: Option<f64>,
    exclusive_minimum: bool,
    multiple_of: Option<f64>,
    max_length: Option<u64>,
    min_length: Option<u64>,
    pattern: Option<Arc<Pattern>>,
    max_items: Option<u64>,
    min_items: Option<u64>,
    unique_items: bool,
    max_properties: Option<u64>,
    min_properties: Option<u64>,
    choices: Option<Vec<Value>>,
    required: Vec<Box<str>>,
    all_of: Vec<Node>,
    any_of: Vec<Node>,
    one_of: Vec<Node>,
    not: Option<Box<Node>>,
}

/// One part of a schema.
#[derive(Debug, Default)]
struct Node {
    ty: Type,
    nullable: bool,
    preserve: bool,
    embedded: bool,
    list: ListKind,
    list_keys: Vec<Box<str>>,
    default: Option<Value>,
    properties: BTreeMap<Box<str>, Node>,
    additional: Additional,
    items: Option<Box<Node>>,
    rules: Option<Box<Rules>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Structural {
    root: Node,
}

impl Structural {
    /// Compiles the schema of whole objects. `null` or no object keeps and accepts everything.
    ///
    /// # Errors
    /// A schema beyond the bounds above, or a pattern that is no regular expression or too large a one.
    pub fn compile(schema: &Value) -> Result<Structural, CompileError> {
        let mut compiler = Compiler::default();
        let mut root = match schema.is_object() {
            true => compiler.node(schema, 0)?,
            false => Node {
                preserve: true,
                ..Node::default()
            },
        };
        // The root is an object with metadata whatever the schema says about these fields.
        root.embedded = false;
        for name in META_FIELDS {
            root.properties.remove(name);
        }
        Ok(Structural { root })
    }
}

#[derive(Default)]
struct Compiler {
    nodes: usize,
    patterns: BTreeMap<String, Arc<Pattern>>,
}

impl Compiler {
    fn node(&mut self, schema: &Value, depth: usize) -> Result<Node, CompileError> {
        self.nodes += 1;
        if depth > DEPTH_MAX {
            return Err(CompileError::TooDeep);
        }
        if self.nodes > NODES_MAX {
            return Err(CompileError::TooLarge);
        }
        let flag = |key: &str| schema[key] == true;
        let mut node = Node {
            ty: Type::of(schema),
            nullable: flag("nullable"),
            preserve: flag("x-kubernetes-preserve-unknown-fields"),
            embedded: flag("x-kubernetes-embedded-resource"),
            default: schema.get("default").filter(|d| !d.is_null()).cloned(),
            list: match schema["x-kubernetes-list-type"].as_str() {
                Some("map") => ListKind::Map,
                Some("set") => ListKind::Set,
                Some("atomic") => ListKind::Atomic,
                _ => ListKind::Unset,
            },
            ..Node::default()
        };
        let keys = schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten();
        node.list_keys = keys.filter_map(Value::as_str).map(Into::into).collect();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            node.properties
                .insert(name.as_str().into(), self.node(property, depth + 1)?);
        }
        node.additional = match &schema["additionalProperties"] {
            Value::Bool(true) => Additional::Allowed,
            Value::Bool(false) => Additional::Forbidden,
            inner @ Value::Object(_) => Additional::Schema(Box::new(self.node(inner, depth + 1)?)),
            _ => Additional::Unset,
        };
        if schema["items"].is_object() {
            node.items = Some(Box::new(self.node(&schema["items"], depth + 1)?));
        }
        node.rules = self.rules(schema, depth)?.map(Box::new);
        Ok(node)
    }

    fn rules(&mut self, schema: &Value, depth: usize) -> Result<Option<Rules>, CompileError> {
        const WORDS: [&str; 20] = [
            "format",
            "maximum",
            "minimum",
            "exclusiveMaximum",
            "exclusiveMinimum",
            "multipleOf",
            "maxLength",
            "minLength",
            "pattern",
            "maxItems",
            "minItems",
            "uniqueItems",
            "maxProperties",
            "minProperties",
            "enum",
            "required",
            "allOf",
            "anyOf",
            "oneOf",
            "not",
        ];
        let Some(object) = schema.as_object() else {
            return Ok(None);
        };
        if !WORDS.iter().any(|word| object.contains_key(*word)) {
            return Ok(None);
        }
        let count = |key: &str| schema[key].as_u64();
        let pattern = match schema["pattern"].as_str().filter(|p| !p.is_empty()) {
            Some(text) => Some(self.pattern(text)?),
            None => None,
        };
        let required = schema["required"].as_array().into_iter().flatten();
        Ok(Some(Rules {
            format: Format::of(schema),
            maximum: schema["maximum"].as_f64(),
            exclusive_maximum: schema["exclusiveMaximum"] == true,
            minimum: schema["minimum"].as_f64(),
            exclusive_minimum: schema["exclusiveMinimum"] == true,
            multiple_of: schema["multipleOf"].as_f64(),
            max_length: count("maxLength"),
            min_length: count("minLength"),
            pattern,
            max_items: count("maxItems"),
            min_items: count("minItems"),
            unique_items: schema["uniqueItems"] == true,
            max_properties: count("maxProperties"),
            min_properties: count("minProperties"),
            choices: schema["enum"].as_array().filter(|e| !e.is_empty()).cloned(),
            required: required.filter_map(Value::as_str).map(Into::into).collect(),
            all_of: self.nodes(&schema["allOf"], depth)?,
            any_of: self.nodes(&schema["anyOf"], depth)?,
            one_of: self.nodes(&schema["oneOf"], depth)?,
            not: match schema["not"].is_object() {
                true => Some(Box::new(self.node(&schema["not"], depth + 1)?)),
                false => None,
            },
        }))
    }

    fn nodes(&mut self, list: &Value, depth: usize) -> Result<Vec<Node>, CompileError> {
        let schemas = list.as_array().into_iter().flatten();
        schemas.map(|schema| self.node(schema, depth + 1)).collect()
    }

    /// Equal patterns are compiled once.
    fn pattern(&mut self, text: &str) -> Result<Arc<Pattern>, CompileError> {
        if let Some(found) = self.patterns.get(text) {
            return Ok(found.clone());
        }
        let refused = |reason| CompileError::Pattern {
            pattern: text.to_owned(),
            reason,
        };
        if self.patterns.len() >= pattern::PATTERNS_MAX {
            return Err(refused(format!(
                "a schema may have at most {} different patterns",
                pattern::PATTERNS_MAX
            )));
        }
        let compiled = Arc::new(Pattern::compile(text).map_err(refused)?);
        self.patterns.insert(text.to_owned(), compiled.clone());
        Ok(compiled)
    }
}

/// `a.b` below a path; the path itself at the root.
fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}
