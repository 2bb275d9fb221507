//! What is wrong with an object's values, in the words of upstream's OpenAPI validator.

use serde_json::{Number, Value};

use super::{Additional, Format, META_FIELDS, Node, Rules, Structural, Type, join};
use crate::field::{FieldError, FieldErrorKind};
use crate::table::ListKind;

/// Most errors that are collected for one object.
const ERRORS_MAX: usize = 500;
/// Path of errors that concern alternatives; upstream's errors of that kind carry none.
const NO_PATH: &str = "<nil>";

impl Structural {
    /// Errors of an object's values: types, required fields, bounds, formats, alternatives. Parts that are as they were
    /// in `old` are not errors, so that a stricter schema does not stop other changes.
    pub(crate) fn check(&self, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
        let mut walk = Walk::default();
        walk.node(&self.root, "", object, old);
        walk.errors
    }
}

impl Node {
    /// Errors of a value that stands alone: a default.
    pub(super) fn check_value(&self, value: &Value) -> Vec<FieldError> {
        let mut walk = Walk::default();
        walk.node(self, "", value, None);
        walk.errors
    }
}

#[derive(Default)]
struct Walk {
    errors: Vec<FieldError>,
    /// Checks made: of alternatives that all fail, the one that got furthest is reported.
    work: usize,
}

impl Walk {
    fn push(&mut self, error: FieldError) {
        if self.errors.len() < ERRORS_MAX {
            self.errors.push(error);
        }
    }

    fn invalid(&mut self, path: &str, value: impl Into<Value>, what: &str) {
        self.push(FieldError::invalid(path, value, &format!("{path} in body {what}")));
    }

    fn wrong_type(&mut self, path: &str, expected: &str, found: &str) {
        let detail = format!("{path} in body must be of type {expected}: {found:?}");
        self.push(FieldError::new(FieldErrorKind::TypeInvalid, path, found, &detail));
    }

    fn alternatives(&mut self, path: &str, what: &str) {
        self.push(FieldError::invalid(NO_PATH, "", &format!("{path:?} must {what}")));
    }

    fn node(&mut self, node: &Node, path: &str, value: &Value, old: Option<&Value>) {
        if old.is_some_and(|old| old == value) {
            return;
        }
        self.work += 1;
        if value.is_null() {
            if node.ty != Type::Any && !node.nullable {
                self.wrong_type(path, node.ty.name(), "null");
            }
            self.choices(node, path, value);
            return;
        }
        self.ty(node, path, value);
        if let Some(rules) = &node.rules {
            self.work += 1;
            self.combined(rules, path, value, old);
            match value {
                Value::String(text) => self.string(rules, path, text),
                Value::Number(number) => self.number(rules, path, number),
                Value::Array(items) => self.bounds(rules, path, items),
                _ => {}
            }
        }
        self.choices(node, path, value);
        match value {
            Value::Array(items) => self.items(node, path, items, old),
            Value::Object(fields) => self.fields(node, path, fields, old),
            _ => {}
        }
    }

    fn ty(&mut self, node: &Node, path: &str, value: &Value) {
        let found = match value {
            Value::Null => return,
            Value::Bool(_) => "boolean",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
            Value::Number(n) if n.is_f64() => "number",
            Value::Number(_) => "integer",
        };
        let whole = || value.as_f64().is_some_and(|n| n.fract() == 0.0);
        let fits = match node.ty {
            Type::Any => true,
            Type::Unknown => false,
            Type::IntOrString => matches!(found, "integer" | "string") || (found == "number" && whole()),
            Type::Integer => found == "integer" || (found == "number" && whole()),
            Type::Number => matches!(found, "integer" | "number"),
            other => other.name() == found,
        };
        if fits {
            return;
        }
        let format = node.rules.as_ref().and_then(|r| r.format).filter(|f| f.of_number());
        match (format, value) {
            // Where a number of a format is expected, the format is the type, and so is the one found.
            (Some(format), Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
                let found = match value {
                    Value::Number(n) if n.is_f64() => "float64",
                    Value::Number(_) => "int64",
                    _ => "",
                };
                self.wrong_type(path, format.name(), found);
            }
            _ => self.wrong_type(path, node.ty.name(), found),
        }
    }

    fn choices(&mut self, node: &Node, path: &str, value: &Value) {
        let Some(choices) = node.rules.as_ref().and_then(|r| r.choices.as_ref()) else {
            return;
        };
        if choices.iter().any(|choice| same(choice, value)) {
            return;
        }
        let words: Vec<String> = choices
            .iter()
            .map(|choice| choice.as_str().map_or_else(|| choice.to_string(), str::to_owned))
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.push(FieldError::not_supported(path, value.clone(), &words));
    }

    fn string(&mut self, rules: &Rules, path: &str, text: &str) {
        let length = text.chars().count() as u64;
        if let Some(max) = rules.max_length.filter(|max| length > *max) {
            self.push(FieldError::too_long(path, usize::try_from(max).unwrap_or(usize::MAX)));
        }
        if let Some(min) = rules.min_length.filter(|min| length < *min) {
            self.invalid(path, text, &format!("should be at least {min} chars long"));
        }
        if let Some(pattern) = rules.pattern.as_ref().filter(|p| !p.matches(text)) {
            self.invalid(path, text, &format!("should match '{}'", pattern.text));
        }
        if let Some(format) = rules.format.filter(|f| !f.accepts(text)) {
            let detail = format!("{path} in body must be of type {}: {text:?}", format.name());
            self.push(FieldError::new(FieldErrorKind::TypeInvalid, path, text, &detail));
        }
    }

    fn number(&mut self, rules: &Rules, path: &str, number: &Number) {
        if let Some(format) = rules.format.filter(|f| !f.holds(number)) {
            let ty = match format {
                Format::Float | Format::Double => "number",
                _ => "integer",
            };
            let what = format!(
                "Checked value must be of type {ty} with format {} in {path}",
                format.name()
            );
            self.push(FieldError::invalid(NO_PATH, "", &what));
        }
        let value = number.as_f64().unwrap_or_default();
        let shown = || Value::Number(number.clone());
        if let Some(factor) = rules.multiple_of.filter(|f| *f > 0.0) {
            let ratio = value / factor;
            if (ratio - ratio.round()).abs() > 1e-9 * ratio.abs().max(1.0) {
                self.invalid(path, shown(), &format!("should be a multiple of {}", plain(factor)));
            }
        }
        if let Some(max) = rules.maximum {
            if rules.exclusive_maximum && value >= max {
                self.invalid(path, shown(), &format!("should be less than {}", plain(max)));
            } else if value > max {
                self.invalid(
                    path,
                    shown(),
                    &format!("should be less than or equal to {}", plain(max)),
                );
            }
        }
        if let Some(min) = rules.minimum {
            if rules.exclusive_minimum && value <= min {
                self.invalid(path, shown(), &format!("should be greater than {}", plain(min)));
            } else if value < min {
                self.invalid(
                    path,
                    shown(),
                    &format!("should be greater than or equal to {}", plain(min)),
                );
            }
        }
    }

    fn bounds(&mut self, rules: &Rules, path: &str, items: &[Value]) {
        let count = items.len() as u64;
        if let Some(min) = rules.min_items.filter(|min| count < *min) {
            self.invalid(path, count, &format!("should have at least {min} items"));
        }
        if let Some(max) = rules.max_items.filter(|max| count > *max) {
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            self.push(FieldError::too_many(path, items.len(), max));
        }
        if rules.unique_items {
            let mut seen = std::collections::HashSet::with_capacity(items.len());
            if !items.iter().all(|item| seen.insert(item.to_string())) {
                self.invalid(path, Value::from(""), "shouldn't contain duplicates");
            }
        }
    }

    fn items(&mut self, node: &Node, path: &str, items: &[Value], old: Option<&Value>) {
        let Some(inner) = &node.items else { return };
        let before = old.and_then(Value::as_array).filter(|_| node.list == ListKind::Map);
        for (i, item) in items.iter().enumerate() {
            let keys = |other: &&Value| node.list_keys.iter().all(|k| other.get(&**k) == item.get(&**k));
            let old = before.and_then(|before| before.iter().find(keys));
            self.node(inner, &format!("{path}[{i}]"), item, old);
        }
    }

    fn fields(&mut self, node: &Node, path: &str, fields: &serde_json::Map<String, Value>, old: Option<&Value>) {
        let rules = node.rules.as_deref();
        let count = fields.len() as u64;
        if let Some(min) = rules.and_then(|r| r.min_properties).filter(|min| count < *min) {
            self.invalid(path, count, &format!("should have at least {min} properties"));
        }
        if let Some(max) = rules.and_then(|r| r.max_properties).filter(|max| count > *max) {
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            self.push(FieldError::too_many(path, fields.len(), max));
        }
        for (key, value) in fields {
            let old = old.and_then(|o| o.get(key));
            match (node.properties.get(key.as_str()), &node.additional) {
                (Some(property), _) => self.node(property, &join(path, key), value, old),
                (None, Additional::Schema(inner)) => self.node(inner, &join(path, key), value, old),
                (None, Additional::Forbidden) if !META_FIELDS.contains(&key.as_str()) || !path.is_empty() => {
                    let detail = format!("{path}.{key} in body is a forbidden property");
                    self.push(FieldError::invalid(path, "", &detail));
                }
                _ => {}
            }
        }
        for key in rules.into_iter().flat_map(|r| &r.required) {
            if !fields.contains_key(&**key) {
                self.push(FieldError::required(join(path, key), ""));
            }
        }
    }

    fn combined(&mut self, rules: &Rules, path: &str, value: &Value, old: Option<&Value>) {
        let attempt = |node: &Node| {
            let mut walk = Walk::default();
            walk.node(node, path, value, old);
            walk
        };
        // The first of those that got furthest.
        let best = |failed: Vec<Walk>| {
            failed.into_iter().fold(None, |best: Option<Walk>, next| match best {
                Some(best) if best.work >= next.work => Some(best),
                _ => Some(next),
            })
        };
        if !rules.any_of.is_empty() {
            let tried: Vec<Walk> = rules.any_of.iter().map(attempt).collect();
            if tried.iter().all(|w| !w.errors.is_empty()) {
                self.alternatives(path, "validate at least one schema (anyOf)");
                self.adopt(best(tried));
            }
        }
        if !rules.one_of.is_empty() {
            let (fit, failed): (Vec<Walk>, Vec<Walk>) =
                rules.one_of.iter().map(attempt).partition(|w| w.errors.is_empty());
            if fit.len() != 1 {
                let found = match fit.len() {
                    0 => "Found none valid".to_owned(),
                    n => format!("Found {n} valid alternatives"),
                };
                self.alternatives(path, &format!("validate one and only one schema (oneOf). {found}"));
                if fit.is_empty() {
                    self.adopt(best(failed));
                }
            }
        }
        if !rules.all_of.is_empty() {
            let mut fit = 0;
            for node in &rules.all_of {
                let walk = attempt(node);
                fit += usize::from(walk.errors.is_empty());
                self.adopt(Some(walk));
            }
            if fit != rules.all_of.len() {
                let none = if fit == 0 { ". None validated" } else { "" };
                self.alternatives(path, &format!("validate all the schemas (allOf){none}"));
            }
        }
        if let Some(not) = &rules.not
            && attempt(not).errors.is_empty()
        {
            self.alternatives(path, "not validate the schema (not)");
        }
    }

    fn adopt(&mut self, walk: Option<Walk>) {
        let Some(walk) = walk else { return };
        self.work += walk.work;
        for error in walk.errors {
            self.push(error);
        }
    }
}

/// Equality in which `1` is `1.0`.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        _ => a == b,
    }
}

/// A bound as Go prints it: whole numbers without a point.
fn plain(number: f64) -> String {
    format!("{number}")
}

impl Format {
    fn of_number(self) -> bool {
        matches!(self, Format::Int32 | Format::Int64 | Format::Float | Format::Double)
    }

    /// Whether a number is in the format's range; formats of text take any number.
    fn holds(self, number: &Number) -> bool {
        match self {
            Format::Int32 => number
                .as_f64()
                .is_some_and(|n| n.fract() == 0.0 && n >= f64::from(i32::MIN) && n <= f64::from(i32::MAX)),
            Format::Int64 => number.as_i64().is_some() || number.as_f64().is_some_and(|n| n.fract() == 0.0),
            _ => true,
        }
    }
}
