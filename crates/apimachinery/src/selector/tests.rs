use serde_json::json;

use super::*;

fn matches(selector: &str, labels: &[(&str, &str)]) -> bool {
    LabelSelector::parse(selector).unwrap().matches(labels)
}

#[test]
fn query_form_matches_as_upstream() {
    let labels = [("app", "web"), ("tier", "front"), ("n", "7"), ("empty", "")];
    for yes in [
        "",
        "app=web",
        "app==web , tier = front",
        "app!=db",
        "absent!=x",
        "absent notin (x, y)",
        "tier in (front,back)",
        "app",
        "!absent",
        "n>6,n<8",
        "empty=",
        "empty in (,x)",
    ] {
        assert!(matches(yes, &labels), "{yes}");
    }
    for no in [
        "app=db",
        "app!=web",
        "!app",
        "absent",
        "absent in (x)",
        "tier notin (front)",
        "app>5",
        "n>7",
    ] {
        assert!(!matches(no, &labels), "{no}");
    }
}

#[test]
fn bad_text_is_refused() {
    for bad in [
        "=a", "a b", "a in b", "a in (b", "a,", ",", "a=(b)", "x/y/z=1", "a=-b", "a in ()x", "!", "A b=c", "a>x",
    ] {
        assert!(LabelSelector::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn prints_what_it_parses() {
    for text in ["a=b,c!=d,e in (f,g),h notin (i,j),k,!l,m>5,n<6", ""] {
        assert_eq!(LabelSelector::parse(text).unwrap().to_string(), text);
    }
}

#[test]
fn object_form() {
    let selector = LabelSelector::from_object(&json!({
        "matchLabels": {"app": "web"},
        "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["back"]}],
    }))
    .unwrap();
    assert!(selector.matches(&json!({"app": "web"})));
    assert!(!selector.matches(&json!({"app": "web", "tier": "back"})));
    assert!(LabelSelector::from_object(&json!({})).unwrap().matches(&json!({})));
    assert!(!LabelSelector::from_object(&Value::Null).unwrap().matches(&json!({})));
    let bad = json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]});
    assert_eq!(
        LabelSelector::from_object(&bad),
        Err(SelectorError::Operator {
            operator: "Gt".to_owned()
        })
    );
    let bad = json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["1"]}]});
    assert!(LabelSelector::from_object(&bad).is_err());
}

#[test]
fn field_selectors() {
    let selector = FieldSelector::parse(r"metadata.name==a\,b,status.phase!=Running").unwrap();
    assert_eq!(selector.exact("metadata.name"), Some("a,b"));
    assert!(selector.matches(|f| if f == "metadata.name" { "a,b" } else { "Pending" }));
    assert!(!selector.matches(|f| if f == "metadata.name" { "a,b" } else { "Running" }));
    assert_eq!(FieldSelector::parse(&selector.to_string()).unwrap(), selector);
    assert!(FieldSelector::parse("metadata.name").is_err());
    assert!(FieldSelector::parse("a=b=c").is_err());
    assert!(FieldSelector::parse("").unwrap().is_everything());
}
