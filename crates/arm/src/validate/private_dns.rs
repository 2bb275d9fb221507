//! Private DNS zones: the body against itself, and its links against every other zone.

use resources::ArmId;
use serde_json::Value;
use vnet_model::private_dns;

use super::World;
use crate::{
    error::{Answer, Fault},
    home::same_id,
};

/// A zone's whole body, record sets and links included.
pub fn zone(id: &ArmId, body: &Value, world: &World) -> Answer<()> {
    if !body["location"]
        .as_str()
        .is_some_and(|l| l.eq_ignore_ascii_case("global"))
    {
        let problem = format!("a private DNS zone's location is 'global', not {}", body["location"]);
        return Err(Fault::field("LocationNotAvailableForResourceType", "location", problem));
    }
    let fail = |e: private_dns::ZoneError| {
        let mut f = Fault::field(e.code, e.path, e.problem);
        if e.code == "Conflict" {
            f.status = http::StatusCode::CONFLICT;
        }
        f
    };
    let view = private_dns::zone(id.name(), body).map_err(fail)?;
    let own = id.to_string();
    for (i, link) in view.links.iter().enumerate() {
        let path = format!("properties.virtualNetworkLinks[{i}].properties.virtualNetwork.id");
        // A link may outlive its network, so that deleting works in any order.
        let known = world.private_zones.iter().any(|z| {
            let links = z.spec.body["properties"]["virtualNetworkLinks"].as_array();
            same_id(&z.spec.id, &own) && links.into_iter().flatten().any(|l| l["name"] == link.name.as_str())
        });
        if !known && world.vnet(&link.virtual_network).is_none() {
            let problem = format!("the virtual network '{}' does not exist", link.virtual_network);
            return Err(Fault::field("InvalidResourceReference", path, problem));
        }
        for other in world
            .private_zones
            .iter()
            .filter(|z| !same_id(&z.spec.id, &own) && !z.is_deleting())
        {
            let Ok(other_id) = ArmId::parse(&other.spec.id) else {
                continue;
            };
            let Ok(view) = private_dns::zone(other_id.name(), &other.spec.body) else {
                continue;
            };
            let Some(theirs) = view
                .links
                .iter()
                .find(|l| same_id(&l.virtual_network, &link.virtual_network))
            else {
                continue;
            };
            if other_id.name().eq_ignore_ascii_case(id.name()) {
                let problem = format!(
                    "a virtual network cannot be linked to two zones of the same name; it is linked to '{}'",
                    other.spec.id
                );
                return Err(Fault::field("BadRequest", path, problem));
            }
            if link.registration && theirs.registration {
                let problem = format!(
                    "the virtual network registers its names in '{}' already, and can do so in one zone only",
                    other.spec.id
                );
                let mut f = Fault::field("Conflict", path, problem);
                f.status = http::StatusCode::CONFLICT;
                return Err(f);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;

    use super::*;
    use crate::home::ArmObject;

    const BASE: &str = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network";

    fn id(zone: &str) -> String {
        format!("{BASE}/privateDnsZones/{zone}")
    }

    fn body(vnet: &str, registration: bool) -> Value {
        json!({"location": "global", "properties": {"virtualNetworkLinks": [{"name": "l", "properties":
            {"virtualNetwork": {"id": format!("{BASE}/virtualNetworks/{vnet}")}, "registrationEnabled": registration}}]}})
    }

    #[test]
    fn links_are_checked_against_the_other_zones() {
        let object = |plural: &str, id: String, body: Value| ArmObject::new(plural, ArmSpec { id, body });
        let world = World {
            vnets: vec![object(
                "virtualnetworks",
                format!("{BASE}/virtualNetworks/v"),
                json!({}),
            )],
            private_zones: vec![
                object("privatednszones", id("one.org"), body("v", true)),
                object("privatednszones", id("old.org"), body("gone", false)),
            ],
            ..World::default()
        };
        let check = |name: &str, body: &Value| {
            let id = ArmId::parse(&id(name)).unwrap();
            zone(&id, body, &world).err().map(|f| (f.status.as_u16(), f.code))
        };
        assert_eq!(check("two.org", &body("v", false)), None);
        assert_eq!(check("one.org", &body("v", true)), None, "its own");
        assert_eq!(check("old.org", &body("gone", false)), None, "its network went");
        let refused = |status, code: &str| Some((status, code.to_owned()));
        assert_eq!(check("two.org", &body("v", true)), refused(409, "Conflict"));
        assert_eq!(
            check("two.org", &body("gone", true)),
            refused(400, "InvalidResourceReference")
        );
        let twin = ArmId::parse(&id("one.org").replace("/g/", "/h/")).unwrap();
        assert_eq!(zone(&twin, &body("v", false), &world).unwrap_err().code, "BadRequest");
        let mut local = body("v", false);
        local["location"] = json!("local");
        assert_eq!(
            check("two.org", &local),
            refused(400, "LocationNotAvailableForResourceType")
        );
    }
}
