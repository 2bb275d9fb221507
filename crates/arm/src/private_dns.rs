//! Private DNS zones as ARM shows them. Record sets and links are elements of their zone's body, one array per type; a zone
//! itself is shown without them, and they are shown with what only the zone knows: the whole name, the names of machines
//! that registered themselves, and the SOA record of a zone that was given none.

use http::StatusCode;
use resources::ArmId;
use serde_json::{Map, Value, json};
use vnet_model::private_dns::{LINKS_MAX, RECORD_SETS_MAX, RECORD_TYPES, REGISTRATIONS_MAX, default_soa};

use crate::{
    app::App,
    error::{Answer, Fault},
    home::ArmObject,
    http::Reply,
    render,
    table::{self, ResourceType},
};

/// Array of links in a zone's body.
pub const LINKS: &str = "virtualNetworkLinks";
/// Where the zone's status has the record sets of machines that registered themselves.
pub const REGISTERED: &str = "registered";
/// What only the platform says of a zone.
const COUNTS: [&str; 7] = [
    "internalId",
    "maxNumberOfRecordSets",
    "maxNumberOfVirtualNetworkLinks",
    "maxNumberOfVirtualNetworkLinksWithRegistration",
    "numberOfRecordSets",
    "numberOfVirtualNetworkLinks",
    "numberOfVirtualNetworkLinksWithRegistration",
];

fn is_zone(kind: &ResourceType) -> bool {
    kind.path == ["privateDnsZones"]
}

/// The type of record sets, if the kind is one.
fn record_type(kind: &ResourceType) -> Option<&'static str> {
    match kind.path {
        ["privateDnsZones", child] => RECORD_TYPES.into_iter().find(|t| t == child),
        _ => None,
    }
}

/// Drops what only the platform says.
pub fn clean(kind: &ResourceType, properties: &mut Map<String, Value>) {
    if is_zone(kind) {
        for field in COUNTS {
            properties.remove(field);
        }
    }
    if kind.path.first() == Some(&"privateDnsZones") {
        for field in ["fqdn", "isAutoRegistered", "virtualNetworkLinkState"] {
            properties.remove(field);
        }
    }
}

/// A zone's PUT is about the zone alone: its record sets and links stay as they are.
pub fn keep_children(kind: &ResourceType, mut body: Map<String, Value>, old: Option<&ArmObject>) -> Map<String, Value> {
    if !is_zone(kind) {
        return body;
    }
    let properties = body.entry("properties").or_insert_with(|| json!({}));
    if let Some(properties) = properties.as_object_mut() {
        for array in RECORD_TYPES.into_iter().chain([LINKS]) {
            match old.map(|o| &o.spec.body["properties"][array]).filter(|v| v.is_array()) {
                Some(was) => drop(properties.insert(array.to_owned(), was.clone())),
                None => drop(properties.remove(array)),
            }
        }
    }
    body
}

/// Adds to a zone's properties the record sets that nobody wrote.
pub fn complete(kind: &ResourceType, properties: &mut Value) {
    if !is_zone(kind) {
        return;
    }
    let registered = properties[REGISTERED].take();
    if let Some(p) = properties.as_object_mut() {
        p.remove(REGISTERED);
        p.entry("SOA").or_insert_with(|| json!([]));
        p.entry("A").or_insert_with(|| json!([]));
    }
    if let Some(soa) = properties["SOA"].as_array_mut().filter(|s| s.is_empty()) {
        let d = default_soa();
        let record = json!({"host": d.host, "email": d.email, "serialNumber": d.serial, "refreshTime": d.refresh_s,
            "retryTime": d.retry_s, "expireTime": d.expire_s, "minimumTtl": d.minimum_s});
        soa.push(json!({"name": "@", "properties": {"ttl": 3600, "soaRecord": record}}));
    }
    if let (Some(a), Some(registered)) = (properties["A"].as_array_mut(), registered.as_array()) {
        for set in registered {
            if !a.iter().any(|e| same_name(e, set)) {
                a.push(set.clone());
            }
        }
    }
}

fn same_name(a: &Value, b: &Value) -> bool {
    let name = |v: &Value| v["name"].as_str().unwrap_or_default().to_lowercase();
    name(a) == name(b)
}

/// One record set or link as a client sees it.
pub fn child(kind: &ResourceType, parent: &Value, mut element: Value) -> Value {
    let zone = parent["name"].as_str().unwrap_or_default();
    if record_type(kind).is_some() {
        let name = element["name"].as_str().unwrap_or_default();
        let fqdn = if name == "@" {
            format!("{zone}.")
        } else {
            format!("{name}.{zone}.")
        };
        if let Some(p) = element["properties"].as_object_mut() {
            p.remove("provisioningState");
            p.insert("fqdn".into(), json!(fqdn));
            p.entry("ttl").or_insert(json!(3600));
            p.entry("isAutoRegistered").or_insert(json!(false));
        }
    } else if kind.path == ["privateDnsZones", LINKS]
        && let Some(p) = element["properties"].as_object_mut()
    {
        p.insert("virtualNetworkLinkState".into(), json!("Completed"));
        p.entry("registrationEnabled").or_insert(json!(false));
    }
    element
}

/// The zone without its children.
pub fn alone(kind: &ResourceType, mut shown: Value) -> Value {
    if is_zone(kind)
        && let Some(p) = shown["properties"].as_object_mut()
    {
        for array in RECORD_TYPES.into_iter().chain([LINKS]) {
            p.remove(array);
        }
    }
    shown
}

/// Refuses to delete what nobody wrote.
pub fn check_delete_child(kind: &ResourceType, shown: &Value) -> Answer<()> {
    let Some(of) = record_type(kind) else { return Ok(()) };
    let refuse = |message: String| Err(Fault::bad_request("BadRequest", message));
    if of == "SOA" {
        return refuse("The SOA record set goes with its zone; it can be changed, not deleted.".into());
    }
    if shown["properties"]["isAutoRegistered"] == true {
        let name = shown["name"].as_str().unwrap_or_default();
        return refuse(format!(
            "'{name}' was registered by its machine and goes with it, or with the link that registers names."
        ));
    }
    Ok(())
}

/// Refuses to delete a zone that virtual networks are linked to.
pub fn check_delete(object: &ArmObject) -> Answer<()> {
    let links = object.spec.body["properties"][LINKS].as_array().map_or(0, Vec::len);
    if links == 0 {
        return Ok(());
    }
    let message = format!("Cannot delete the zone while it has {links} virtual network links. Delete the links first.");
    Err(Fault::conflict("CannotDeleteResource", message))
}

/// `ALL` of a zone: its record sets of every type.
pub(crate) async fn list_all(app: &App, id: &ArmId, kind: &'static ResourceType) -> Answer<Reply> {
    let object = app.home.object(kind.storage.plural(), &id.to_string()).await?;
    let object = object.ok_or_else(|| {
        let full = format!("{}/{}", kind.full(), id.name());
        Fault::resource_not_found(&full, id.resource_group.as_deref().unwrap_or_default())
    })?;
    let zone = render::resource(kind, &object);
    let mut out = Vec::new();
    for of in RECORD_TYPES {
        let Some(child) = table::find(kind.provider, &["privateDnsZones", of]) else {
            return Err(Fault::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalServerError",
                "a record type is not served",
            ));
        };
        let sets = zone["properties"][of].as_array().into_iter().flatten();
        out.extend(sets.map(|s| render::child(child, &zone, s)));
    }
    Ok(Reply::list(out))
}

/// Numbers and limits of a zone with `sets` record sets and `links` links, `registering` of them with registration.
pub fn counts(sets: usize, links: usize, registering: usize) -> Value {
    json!({
        "maxNumberOfRecordSets": RECORD_SETS_MAX,
        "maxNumberOfVirtualNetworkLinks": LINKS_MAX,
        "maxNumberOfVirtualNetworkLinksWithRegistration": REGISTRATIONS_MAX,
        "numberOfRecordSets": sets,
        "numberOfVirtualNetworkLinks": links,
        "numberOfVirtualNetworkLinksWithRegistration": registering,
    })
}
