//! Who a container runs as: the pod's wishes, the image's `USER`, and the image's passwd and group files.

use crate::api::{Error, Security};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplemental groups, sorted.
    pub groups: Vec<u32>,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Account { name, uid, gid })
    })
}

/// Name, id and members of each group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((
            fields.next()?,
            fields.nth(1)?.parse().ok()?,
            fields.next().unwrap_or_default(),
        ))
    })
}

/// Decides. `image_user` is `USER`: `name`, `uid`, `name:group`, `uid:gid` or empty.
///
/// # Errors
/// `Invalid` for a user or group the image does not know, a negative id, or root where `run_as_non_root` is set.
pub fn resolve(security: &Security, image_user: &str, passwd: &str, group: &str) -> Result<User, Error> {
    let invalid = |field: &str, reason: String| Error::Invalid {
        field: field.to_owned(),
        reason,
    };
    let id = |field: &str, value: i64| u32::try_from(value).map_err(|_| invalid(field, format!("{value} is no id")));
    let (user_part, group_part) = image_user.split_once(':').unwrap_or((image_user, ""));

    let mut user = User::default();
    let mut name = None;
    if let Some(wanted) = security.run_as_user {
        user.uid = id("runAsUser", wanted)?;
        let account = accounts(passwd).find(|account| account.uid == user.uid);
        user.gid = account.as_ref().map_or(0, |account| account.gid);
        name = account.map(|account| account.name);
    } else if !user_part.is_empty() {
        let number = user_part.parse::<u32>().ok();
        let account = accounts(passwd).find(|account| account.name == user_part || Some(account.uid) == number);
        match (account, number) {
            (Some(account), _) => {
                (user.uid, user.gid) = (account.uid, account.gid);
                name = Some(account.name);
            }
            (None, Some(number)) => user.uid = number,
            (None, None) => {
                return Err(invalid(
                    "image user",
                    format!("{user_part:?} is not in the image's /etc/passwd"),
                ));
            }
        }
        if !group_part.is_empty() {
            let number = group_part.parse::<u32>().ok();
            let known = groups(group).find(|(name, gid, _)| *name == group_part || Some(*gid) == number);
            user.gid = known.map(|(_, gid, _)| gid).or(number).ok_or_else(|| {
                invalid(
                    "image user",
                    format!("group {group_part:?} is not in the image's /etc/group"),
                )
            })?;
        }
    } else {
        name = accounts(passwd)
            .find(|account| account.uid == 0)
            .map(|account| account.name);
    }
    if let Some(wanted) = security.run_as_group {
        user.gid = id("runAsGroup", wanted)?;
    }
    if let Some(name) = name {
        let member = groups(group).filter(|(_, _, members)| members.split(',').any(|member| member == name));
        user.groups.extend(member.map(|(_, gid, _)| gid));
    }
    for wanted in &security.supplemental_groups {
        user.groups.push(id("supplementalGroups", *wanted)?);
    }
    user.groups.sort_unstable();
    user.groups.dedup();
    if security.run_as_non_root && user.uid == 0 {
        return Err(invalid("runAsNonRoot", "the container would run as root".to_owned()));
    }
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nredis:x:999:1000::/var/lib/redis:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nredis:x:1000:\nadm:x:4:syslog,redis\nweb:x:33:\n";

    fn user(image: &str, security: Security) -> Result<User, String> {
        resolve(&security, image, PASSWD, GROUP).map_err(|error| error.to_string())
    }

    #[test]
    fn images_name_users_and_groups_in_four_ways() {
        let none = Security::default;
        assert_eq!(user("", none()).unwrap(), User::default());
        assert_eq!(
            user("redis", none()).unwrap(),
            User {
                uid: 999,
                gid: 1000,
                groups: vec![4]
            }
        );
        assert_eq!(
            user("999", none()).unwrap(),
            User {
                uid: 999,
                gid: 1000,
                groups: vec![4]
            }
        );
        assert_eq!(user("redis:web", none()).unwrap().gid, 33);
        assert_eq!(
            user("5:6", none()).unwrap(),
            User {
                uid: 5,
                gid: 6,
                groups: vec![]
            }
        );
        assert!(user("nobody", none()).unwrap_err().contains("nobody"));
        assert!(user("redis:nogroup", none()).unwrap_err().contains("nogroup"));
    }

    #[test]
    fn the_pod_decides_over_the_image() {
        let security = Security {
            run_as_user: Some(7),
            run_as_group: Some(8),
            supplemental_groups: vec![9, 2, 9],
            run_as_non_root: true,
            ..Security::default()
        };
        assert_eq!(
            user("redis", security).unwrap(),
            User {
                uid: 7,
                gid: 8,
                groups: vec![2, 9]
            }
        );
        let non_root = Security {
            run_as_non_root: true,
            ..Security::default()
        };
        assert!(user("", non_root).unwrap_err().contains("runAsNonRoot"));
        assert!(
            user(
                "",
                Security {
                    run_as_user: Some(-1),
                    ..Security::default()
                }
            )
            .is_err()
        );
    }
}
