//! RFC 6902, with bounds on the number of operations and on what copies may add.

use serde_json::Value;

use super::PatchError;

/// Most operations of one patch (the machinery's bound).
const OPERATIONS_MAX: usize = 10_000;
/// Most bytes that `copy` operations of one patch may add (the machinery's bound for a request body).
const COPY_BYTES_MAX: usize = 3 * 1024 * 1024;

pub(super) fn apply(object: &mut Value, ops: &Value) -> Result<(), PatchError> {
    let ops = ops
        .as_array()
        .ok_or_else(|| malformed("a JSON patch is an array of operations"))?;
    if ops.len() > OPERATIONS_MAX {
        return Err(PatchError::TooManyOperations {
            limit: OPERATIONS_MAX,
            found: ops.len(),
        });
    }
    let mut work = object.clone();
    let mut copied = 0;
    for op in ops {
        step(&mut work, op, &mut copied)?;
    }
    *object = work;
    Ok(())
}

fn step(doc: &mut Value, op: &Value, copied: &mut usize) -> Result<(), PatchError> {
    let text = |field: &str| op.get(field).and_then(Value::as_str);
    let name = text("op").ok_or_else(|| malformed("operation without \"op\""))?;
    let path = text("path").ok_or_else(|| malformed(&format!("{name} operation without \"path\"")))?;
    let at = parse(path)?;
    let value = || {
        op.get("value")
            .cloned()
            .ok_or_else(|| malformed(&format!("{name} operation without \"value\"")))
    };
    let from = || text("from").ok_or_else(|| malformed(&format!("{name} operation without \"from\"")));
    match name {
        "add" => add(doc, path, &at, value()?),
        "remove" => remove(doc, name, path, &at).map(drop),
        "replace" => {
            let slot = find(doc, &at).ok_or_else(|| missing(name, path))?;
            *slot = value()?;
            Ok(())
        }
        "move" => {
            let from = from()?;
            let source = parse(from)?;
            if at.len() > source.len() && at.starts_with(&source) {
                return Err(unfit(format!("move operation into its own child: {path}")));
            }
            let moved = remove(doc, name, from, &source)?;
            add(doc, path, &at, moved)
        }
        "copy" => {
            let from = from()?;
            let value = find(doc, &parse(from)?).ok_or_else(|| missing(name, from))?.clone();
            *copied += weight(&value);
            if *copied > COPY_BYTES_MAX {
                return Err(PatchError::CopyTooLarge { limit: COPY_BYTES_MAX });
            }
            add(doc, path, &at, value)
        }
        "test" => {
            // A missing member equals null, as the machinery's library has it.
            let expected = op.get("value").cloned().unwrap_or(Value::Null);
            let found = find(doc, &at).map_or(Value::Null, |v| v.clone());
            if same(&found, &expected) {
                Ok(())
            } else {
                Err(unfit(format!("testing value {path} failed: test failed")))
            }
        }
        other => Err(malformed(&format!("unknown operation {other:?}"))),
    }
}

fn add(doc: &mut Value, path: &str, at: &[String], value: Value) -> Result<(), PatchError> {
    let Some((last, parents)) = at.split_last() else {
        *doc = value;
        return Ok(());
    };
    let gone = || {
        unfit(format!(
            "add operation does not apply: doc is missing path: {path:?}: missing value"
        ))
    };
    match find(doc, parents).ok_or_else(gone)? {
        Value::Object(map) => {
            map.insert(last.clone(), value);
            Ok(())
        }
        Value::Array(list) => {
            let index = if last == "-" { list.len() } else { index(last, path)? };
            if index > list.len() {
                return Err(unfit(format!(
                    "add operation does not apply: index {index} of {path:?} is out of bounds"
                )));
            }
            list.insert(index, value);
            Ok(())
        }
        _ => Err(gone()),
    }
}

fn remove(doc: &mut Value, op: &str, path: &str, at: &[String]) -> Result<Value, PatchError> {
    let (last, parents) = at
        .split_last()
        .ok_or_else(|| unfit(format!("{op} operation on the whole document")))?;
    match find(doc, parents) {
        Some(Value::Object(map)) => map.remove(last).ok_or_else(|| missing(op, path)),
        Some(Value::Array(list)) => {
            let index = index(last, path)?;
            if index < list.len() {
                Ok(list.remove(index))
            } else {
                Err(missing(op, path))
            }
        }
        _ => Err(missing(op, path)),
    }
}

fn find<'v>(doc: &'v mut Value, at: &[String]) -> Option<&'v mut Value> {
    at.iter().try_fold(doc, |node, part| match node {
        Value::Object(map) => map.get_mut(part),
        Value::Array(list) => part.parse::<usize>().ok().and_then(|i| list.get_mut(i)),
        _ => None,
    })
}

/// Equality by value: 1 and 1.0 are the same number.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => x == y || x.as_f64() == y.as_f64(),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| same(a, b)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, a)| y.get(k).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}

/// Rough size in bytes, without encoding.
fn weight(value: &Value) -> usize {
    match value {
        Value::String(s) => s.len() + 2,
        Value::Array(list) => 2 + list.iter().map(|v| weight(v) + 1).sum::<usize>(),
        Value::Object(map) => 2 + map.iter().map(|(k, v)| k.len() + 4 + weight(v)).sum::<usize>(),
        _ => 8,
    }
}

fn parse(path: &str) -> Result<Vec<String>, PatchError> {
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let rest = path
        .strip_prefix('/')
        .ok_or_else(|| malformed(&format!("path {path:?} does not start with a slash")))?;
    Ok(rest
        .split('/')
        .map(|part| part.replace("~1", "/").replace("~0", "~"))
        .collect())
}

fn index(part: &str, path: &str) -> Result<usize, PatchError> {
    let plain = part == "0" || !part.starts_with(['0', '+']);
    part.parse()
        .ok()
        .filter(|_| plain)
        .ok_or_else(|| unfit(format!("{part:?} in {path:?} is not an index")))
}

fn malformed(detail: &str) -> PatchError {
    PatchError::Malformed { detail: detail.into() }
}

fn unfit(detail: String) -> PatchError {
    PatchError::Unprocessable { detail }
}

fn missing(op: &str, path: &str) -> PatchError {
    unfit(format!(
        "{op} operation does not apply: doc is missing key: {path}: missing value"
    ))
}
