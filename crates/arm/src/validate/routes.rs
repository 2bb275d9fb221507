//! Route tables.

use serde_json::Value;

use super::World;
use crate::{
    error::{Answer, Fault},
    home::{ArmObject, same_id},
};

/// A table's whole body, routes included.
pub fn table(body: &Value) -> Answer<()> {
    let list = body["properties"]["routes"].as_array().map_or(&[][..], Vec::as_slice);
    for (n, route) in list.iter().enumerate() {
        let name = route["name"].as_str().unwrap_or_default();
        let path = format!("properties.routes[{n}].name");
        if name.is_empty() || name.len() > 80 {
            let problem = "a route needs a name of at most 80 characters";
            return Err(Fault::field("InvalidResourceName", path, problem));
        }
        let same = |o: &&Value| o["name"].as_str().is_some_and(|o| o.eq_ignore_ascii_case(name));
        if list[..n].iter().any(|o| same(&o)) {
            let problem = format!("there are two routes named '{name}'");
            return Err(Fault::field("DuplicateResourceName", path, problem));
        }
    }
    match vnet_model::arm::routes(body) {
        Ok(_) => Ok(()),
        Err((n, e)) => Err(Fault::field(e.code(), format!("properties.routes[{n}]"), e)),
    }
}

/// A subnet's reference to a table: it must exist.
pub fn reference(id: Option<&String>, path: impl Into<String>, world: &World) -> Answer<()> {
    match id {
        None => Ok(()),
        Some(id)
            if world
                .route_tables
                .iter()
                .any(|t| same_id(&t.spec.id, id) && !t.is_deleting()) =>
        {
            Ok(())
        }
        Some(id) => {
            let problem = format!("the route table '{id}' does not exist");
            Err(Fault::field("InvalidResourceReference", path, problem))
        }
    }
}

/// Refuses to delete a table that a subnet names.
pub fn delete_table(object: &ArmObject, world: &World) -> Answer<()> {
    let users = users(&object.spec.id, &world.vnets);
    let Some(user) = users.first() else { return Ok(()) };
    let message = format!(
        "Route table {} cannot be deleted because it is in use by {user} ({} in all). Take it off there first.",
        object.spec.id,
        users.len()
    );
    Err(Fault::bad_request("InUseRouteTableCannotBeDeleted", message))
}

/// ARM ids of the subnets that name the table.
pub fn users(table: &str, vnets: &[ArmObject]) -> Vec<String> {
    let mut out = Vec::new();
    for vnet in vnets {
        let subnets = vnet.spec.body["properties"]["subnets"].as_array();
        let names = |s: &&Value| {
            s["properties"]["routeTable"]["id"]
                .as_str()
                .is_some_and(|id| same_id(id, table))
        };
        let named = subnets.into_iter().flatten().filter(names);
        out.extend(named.map(|s| format!("{}/subnets/{}", vnet.spec.id, s["name"].as_str().unwrap_or_default())));
    }
    out
}

#[cfg(test)]
mod tests {
    use resources::{ArmId, ArmSpec};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_in_use_stays_and_a_missing_one_is_refused() {
        let table_id = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/routeTables/t";
        let vnet_id = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/v";
        let body = json!({"location": "x", "properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]}, "subnets": [
            {"name": "a", "properties": {"addressPrefix": "10.0.0.0/24", "routeTable": {"id": table_id}}}]}});
        let object = |plural, id: &str, body: &Value| {
            let (id, body) = (id.to_owned(), body.clone());
            ArmObject::new(plural, ArmSpec { id, body })
        };
        let mut world = World::default();
        let id = ArmId::parse(vnet_id).unwrap();
        let check = |world: &World| {
            super::super::network::vnet(&id, &body, None, world)
                .err()
                .map(|f| f.code)
        };
        assert_eq!(check(&world).as_deref(), Some("InvalidResourceReference"));
        world.route_tables = vec![object("routetables", table_id, &json!({}))];
        assert_eq!(check(&world), None);
        delete_table(&world.route_tables[0], &world).unwrap();
        world.vnets = vec![object("virtualnetworks", vnet_id, &body)];
        let refused = delete_table(&world.route_tables[0], &world).unwrap_err();
        assert_eq!(refused.code, "InUseRouteTableCannotBeDeleted");
        let twice = json!({"name": "r", "properties": {"addressPrefix": "10.0.0.0/8", "nextHopType": "None"}});
        let refused = table(&json!({"properties": {"routes": [twice, twice]}})).unwrap_err();
        assert_eq!(refused.code, "DuplicateResourceName");
    }
}
