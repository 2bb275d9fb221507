//! Service endpoints: a subnet with a route table reaches its services' prefixes directly, past the table's shorter routes.

use resources::{VirtualNetwork, views::VnetView};
use vnet_model::{
    endpoints::prefixes,
    fabric::{NextHop, RouteSpec, RouteTableSpec, VnetSpec},
    service_tags::ServiceTags,
};

/// Gives each subnet with endpoints and a route table a table of its own, with the endpoints' routes added. A route that
/// the table has for the very same prefix stays. Without a table nothing leads elsewhere, and nothing is added.
pub fn add(vnet: &mut VnetSpec, object: &VirtualNetwork, tags: &ServiceTags) {
    let Ok(view) = VnetView::parse(&object.spec.body) else {
        return;
    };
    let mut fresh = Vec::new();
    for subnet in &mut vnet.subnets {
        let endpoints = view
            .subnet(&subnet.name)
            .map(|s| prefixes(&s.service_endpoints, tags))
            .unwrap_or_default();
        let table = subnet.route_table.as_ref();
        let table = table.and_then(|key| vnet.route_tables.iter().find(|t| t.key == *key));
        let (Some(table), false) = (table, endpoints.is_empty()) else {
            continue;
        };
        let mut own = RouteTableSpec {
            key: format!("{}.{}", table.key, subnet.name.to_lowercase()),
            routes: table.routes.clone(),
        };
        for prefix in endpoints {
            if !own.routes.iter().any(|r| r.prefix == prefix) {
                own.routes.push(RouteSpec {
                    prefix,
                    next_hop: NextHop::Internet,
                });
            }
        }
        subnet.route_table = Some(own.key.clone());
        fresh.push(own);
    }
    vnet.route_tables.extend(fresh);
}

#[cfg(test)]
mod tests {
    use resources::ArmSpec;
    use serde_json::json;
    use vnet_model::fabric::SubnetSpec;

    use super::*;

    #[test]
    fn a_service_is_reached_past_a_table_that_leads_elsewhere() {
        let subnet = |name: &str, third: u8, endpoints: &[&str]| {
            let endpoints: Vec<_> = endpoints.iter().map(|s| json!({"service": s})).collect();
            json!({"name": name, "properties": {"addressPrefix": format!("10.0.{third}.0/24"), "serviceEndpoints": endpoints}})
        };
        let body = json!({"properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/16"]},
            "subnets": [subnet("a", 0, &["Microsoft.Storage"]), subnet("b", 1, &[]), subnet("c", 2, &["Microsoft.Storage"])]}});
        let object = VirtualNetwork::new("v", ArmSpec { id: "/v".into(), body });
        let spec = |name: &str, third: u8, table: Option<&str>| SubnetSpec {
            name: name.into(),
            prefix: format!("10.0.{third}.0/24").parse().unwrap(),
            route_table: table.map(str::to_owned),
            ..SubnetSpec::default()
        };
        let mut vnet = VnetSpec {
            key: "v".into(),
            subnets: vec![spec("a", 0, Some("t")), spec("b", 1, Some("t")), spec("c", 2, None)],
            route_tables: vec![RouteTableSpec {
                key: "t".into(),
                routes: vec![RouteSpec {
                    prefix: "0.0.0.0/0".parse().unwrap(),
                    next_hop: NextHop::None,
                }],
            }],
            ..VnetSpec::default()
        };
        let tags = ServiceTags::parse(["Storage=10.9.0.0/24"]).unwrap();
        add(&mut vnet, &object, &tags);
        let tables: Vec<Option<&str>> = vnet.subnets.iter().map(|s| s.route_table.as_deref()).collect();
        assert_eq!(tables, [Some("t.a"), Some("t"), None]);
        assert_eq!(vnet.route_tables[1].routes.len(), 2);
        assert_eq!(vnet.route_tables[1].routes[1].next_hop, NextHop::Internet);
        // Nothing to do without prefixes.
        let before = vnet.clone();
        add(&mut vnet, &object, &ServiceTags::default());
        assert_eq!(vnet, before);
    }
}
