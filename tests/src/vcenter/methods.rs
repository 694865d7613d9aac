//! The methods of the API.

use super::xml::{self, all, answer, escape, fault, first, property, reference};
use super::{DATACENTER, DATASTORE, Machine, Snapshot, State, Task, USER};

pub struct Told {
    pub status: u16,
    pub body: String,
    pub cookie: Option<String>,
}

fn good(method: &str, inner: &str) -> Told {
    Told { status: 200, body: answer(method, inner), cookie: None }
}

fn bad(kind: &str, message: &str) -> Told {
    Told { status: 500, body: fault(kind, message), cookie: None }
}

pub fn call(state: &mut State, body: &str, cookie: Option<&str>) -> Told {
    let method = xml::method(body);
    state.calls.push(method.clone());
    let (this, kind) = (first(body, "_this"), xml::kind(body, "_this"));
    match method.as_str() {
        "RetrieveServiceContent" => {
            let part = |name: &str, kind: &str| format!("<{name} type=\"{kind}\">{kind}</{name}>");
            let parts = [
                "<rootFolder type=\"Folder\">group-d1</rootFolder>".to_owned(),
                part("propertyCollector", "PropertyCollector"),
                "<about><name>VMware vCenter Server</name><apiType>VirtualCenter</apiType><apiVersion>7.0</apiVersion></about>".to_owned(),
                part("sessionManager", "SessionManager"),
                part("searchIndex", "SearchIndex"),
            ];
            return good(&method, &format!("<returnval>{}</returnval>", parts.concat()));
        }
        "Login" => {
            if first(body, "userName") != USER || first(body, "password") != state.password {
                return bad("InvalidLogin", "Cannot complete login due to an incorrect user name or password.");
            }
            let session = state.id("session");
            state.sessions.insert(session.clone());
            let told =
                good(&method, "<returnval><key>52773cd3</key><userName>VSPHERE.LOCAL\\tidemark</userName></returnval>");
            return Told { cookie: Some(session), ..told };
        }
        _ => {}
    }
    if !cookie.is_some_and(|session| state.sessions.contains(session)) {
        return bad("NotAuthenticated", "The session is not authenticated.");
    }
    match method.as_str() {
        "Logout" => {
            state.sessions.remove(cookie.unwrap_or_default());
            good(&method, "")
        }
        "CurrentTime" => good(&method, "<returnval>2026-11-22T19:00:00.0Z</returnval>"),
        "FindByInventoryPath" => {
            let path = first(body, "inventoryPath");
            let found = state.machines.iter().find(|(_, machine)| format!("{DATACENTER}/vm/{}", machine.name) == path);
            good(&method, &found.map(|(id, _)| returned("VirtualMachine", id)).unwrap_or_default())
        }
        "FindByUuid" => {
            let is_instance = first(body, "instanceUuid") == "true";
            let found = state.machines.iter().find(|(_, machine)| is_instance && machine.uuid == first(body, "uuid"));
            good(&method, &found.map(|(id, _)| returned("VirtualMachine", id)).unwrap_or_default())
        }
        "RetrievePropertiesEx" => properties(state, body),
        "ReconfigVM_Task" => {
            let Some(machine) = state.machines.get_mut(&this) else { return gone(&this) };
            if first(body, "changeTrackingEnabled") == "true" && !machine.tracks {
                machine.tracks = true;
                machine.disks.iter_mut().for_each(|disk| disk.reset_tracking());
            }
            machine.version += 1;
            begun(state, &method, Ok(None))
        }
        "CreateSnapshot_Task" => create(state, &method, &this, body),
        "RemoveSnapshot_Task" => {
            if !state.faults.remove.is_empty() {
                let (kind, message) = state.faults.remove.remove(0);
                return begun(state, &method, Err((kind.to_owned(), message.to_owned())));
            }
            let removed =
                state.machines.values_mut().any(|machine| machine.remove_snapshot(|snapshot| snapshot.id == this));
            if removed { begun(state, &method, Ok(None)) } else { gone(&this) }
        }
        "QueryChangedDiskAreas" => changes(state, &method, &this, body),
        other => bad("NotSupported", &format!("{other} of {kind}")),
    }
}

fn returned(kind: &str, value: &str) -> String {
    format!("<returnval type=\"{kind}\">{value}</returnval>")
}

fn gone(id: &str) -> Told {
    bad(
        "ManagedObjectNotFound",
        &format!("The object '{id}' has already been deleted or has not been completely created"),
    )
}

fn begun(state: &mut State, method: &str, outcome: Result<Option<(String, String)>, (String, String)>) -> Told {
    let task = state.id("task");
    state.tasks.insert(task.clone(), Task { looks: 0, outcome });
    good(method, &returned("Task", &task))
}

fn create(state: &mut State, method: &str, this: &str, body: &str) -> Told {
    let quiesce = first(body, "quiesce") == "true";
    if quiesce && state.faults.quiesce {
        let why =
            "An error occurred while quiescing the virtual machine. See the virtual machine's event log for details.";
        return begun(state, method, Err(("ApplicationQuiesceFault".to_owned(), why.to_owned())));
    }
    if !state.faults.create.is_empty() {
        let (kind, message) = state.faults.create.remove(0);
        return begun(state, method, Err((kind.to_owned(), message.to_owned())));
    }
    let id = state.id("snapshot");
    let Some(machine) = state.machines.get_mut(this) else { return gone(this) };
    machine.make_snapshot(&id, &first(body, "name"), &first(body, "description"), quiesce);
    begun(state, method, Ok(Some(("VirtualMachineSnapshot".to_owned(), id))))
}

fn changes(state: &mut State, method: &str, this: &str, body: &str) -> Told {
    if !state.faults.query.is_empty() {
        let kind = state.faults.query.remove(0);
        return bad(kind, "Error caused by file /vmfs/volumes/5f3/web/web.vmdk");
    }
    let nothing = state.faults.query_nothing > 0;
    state.faults.query_nothing = state.faults.query_nothing.saturating_sub(1);
    let Some(machine) = state.machines.get(this) else { return gone(this) };
    let (key, snapshot) = (first(body, "deviceKey"), first(body, "snapshot"));
    let from: u64 = first(body, "startOffset").parse().unwrap();
    let Some(at) = machine.disks.iter().position(|disk| disk.key.to_string() == key) else {
        return bad("InvalidArgument", "A specified parameter was not correct: deviceKey");
    };
    let Some(snapshot) = machine.snapshots.iter().find(|found| found.id == snapshot) else { return gone(&snapshot) };
    let Some(until) = &snapshot.change_ids[at] else { return bad("FileFault", "changes are not tracked") };
    match machine.disks[at].query(&first(body, "changeId"), until, from) {
        Err(kind) => bad(kind, "A specified parameter was not correct: changeId"),
        Ok((length, areas)) => {
            let length = if nothing { 0 } else { length };
            let areas: String = areas
                .iter()
                .map(|(start, length)| {
                    format!("<changedArea><start>{start}</start><length>{length}</length></changedArea>")
                })
                .collect();
            good(
                method,
                &format!("<returnval><startOffset>{from}</startOffset><length>{length}</length>{areas}</returnval>"),
            )
        }
    }
}

fn properties(state: &mut State, body: &str) -> Told {
    let (object, kind) = (first(body, "obj"), xml::kind(body, "obj"));
    let found = match kind.as_str() {
        "VirtualMachine" => state.machines.get(&object).map(machine_properties),
        "VirtualMachineSnapshot" => state.machines.values().find_map(|machine| {
            let at = machine.snapshots.iter().position(|snapshot| snapshot.id == object)?;
            Some(vec![devices(machine, Some(at))])
        }),
        "Datastore" => Some(vec![
            property("name", "xsd:string", DATASTORE),
            property("summary.freeSpace", "xsd:long", &state.free_bytes.to_string()),
            reference("parent", "Folder", "group-s5"),
        ]),
        "Folder" if object == "group-s5" => {
            Some(vec![property("name", "xsd:string", "datastore"), reference("parent", "Datacenter", "datacenter-2")])
        }
        "Datacenter" => {
            Some(vec![property("name", "xsd:string", DATACENTER), reference("parent", "Folder", "group-d1")])
        }
        "Folder" => Some(vec![property("name", "xsd:string", "Datacenters")]),
        "Task" => state.tasks.get_mut(&object).map(task_properties),
        _ => None,
    };
    let Some(found) = found else { return gone(&object) };
    let wanted = all(body, "pathSet");
    let is_wanted = |property: &&String| wanted.contains(&first(property, "name"));
    let sets: String = found.iter().filter(is_wanted).cloned().collect();
    let inner = format!("<returnval><objects><obj type=\"{kind}\">{object}</obj>{sets}</objects></returnval>");
    good("RetrievePropertiesEx", &inner)
}

fn task_properties(task: &mut Task) -> Vec<String> {
    task.looks += 1;
    // The first look always finds it running.
    let state = match (&task.outcome, task.looks) {
        (_, 1) => "<state>running</state><progress>35</progress>".to_owned(),
        (Ok(Some((kind, id))), _) => {
            format!("<state>success</state><result type=\"{kind}\" xsi:type=\"ManagedObjectReference\">{id}</result>")
        }
        (Ok(None), _) => "<state>success</state>".to_owned(),
        (Err((kind, message)), _) => format!(
            "<state>error</state><error><fault xsi:type=\"{kind}\"></fault><localizedMessage>{}</localizedMessage></error>",
            escape(message)
        ),
    };
    vec![property("info", "TaskInfo", &format!("<cancelled>false</cancelled>{state}<cancelable>false</cancelable>"))]
}

fn machine_properties(machine: &Machine) -> Vec<String> {
    let string = |name: &str, value: &str| property(name, "xsd:string", value);
    let mut all = vec![
        string("name", &escape(&machine.name)),
        string("config.instanceUuid", &machine.uuid),
        string("config.uuid", "42291d0e-7f2f-77d2-51cd-5a3c1a6b7e55"),
        string("config.changeVersion", &format!("2026-11-22T19:00:00.{:06}Z", machine.version)),
        property("config.changeTrackingEnabled", "xsd:boolean", &machine.tracks.to_string()),
        property("capability.changeTrackingSupported", "xsd:boolean", "true"),
        property(
            "runtime.powerState",
            "VirtualMachinePowerState",
            if machine.is_on { "poweredOn" } else { "poweredOff" },
        ),
        reference("runtime.host", "HostSystem", &machine.host),
        devices(machine, None),
    ];
    if !machine.snapshots.is_empty() {
        let current = machine.snapshots.last().map(|snapshot| snapshot.id.clone()).unwrap_or_default();
        let tree = tree("rootSnapshotList", &machine.snapshots);
        let info = format!("<currentSnapshot type=\"VirtualMachineSnapshot\">{current}</currentSnapshot>{tree}");
        all.push(property("snapshot", "VirtualMachineSnapshotInfo", &info));
    }
    all
}

fn tree(name: &str, snapshots: &[Snapshot]) -> String {
    let Some((first, rest)) = snapshots.split_first() else { return String::new() };
    format!(
        "<{name}><snapshot type=\"VirtualMachineSnapshot\">{}</snapshot><vm type=\"VirtualMachine\">vm-42</vm><name>{}</name>\
         <description>{}</description><id>7</id><createTime>2026-11-22T19:00:00Z</createTime><state>poweredOn</state>\
         <quiesced>{}</quiesced>{}</{name}>",
        first.id,
        escape(&first.name),
        escape(&first.description),
        first.quiesced,
        tree("childSnapshotList", rest)
    )
}

/// Now, or as they were at a snapshot.
fn devices(machine: &Machine, snapshot: Option<usize>) -> String {
    let controller = "<VirtualDevice xsi:type=\"ParaVirtualSCSIController\"><key>1000</key><busNumber>0</busNumber></VirtualDevice>\
                      <VirtualDevice xsi:type=\"VirtualE1000\"><key>4000</key></VirtualDevice>";
    let disks: String = machine
        .disks
        .iter()
        .enumerate()
        .map(|(at, disk)| {
            let above = match snapshot {
                Some(0) => String::new(),
                Some(at) => format!("-{at:06}"),
                None if machine.snapshots.is_empty() => String::new(),
                None => format!("-{:06}", machine.snapshots.len()),
            };
            let change_id = match snapshot {
                Some(snapshot) => machine.snapshots[snapshot].change_ids[at].clone(),
                None => machine.tracks.then(|| disk.change_id()),
            };
            let change_id = change_id.map(|id| format!("<changeId>{id}</changeId>")).unwrap_or_default();
            format!(
                "<VirtualDevice xsi:type=\"VirtualDisk\"><key>{}</key><deviceInfo><label>Hard disk {}</label><summary>s</summary></deviceInfo>\
                 <backing xsi:type=\"VirtualDiskFlatVer2BackingInfo\"><fileName>[{DATASTORE}] {}/disk{at}{above}.vmdk</fileName>\
                 <datastore type=\"Datastore\">datastore-11</datastore><diskMode>{}</diskMode><thinProvisioned>true</thinProvisioned>\
                 <uuid>{}</uuid>{change_id}<sharing>sharingNone</sharing></backing><controllerKey>1000</controllerKey>\
                 <unitNumber>{}</unitNumber><capacityInKB>{}</capacityInKB><capacityInBytes>{}</capacityInBytes></VirtualDevice>",
                disk.key,
                at + 1,
                escape(&machine.name),
                disk.mode,
                disk.uuid.to_uppercase(),
                disk.unit,
                disk.bytes / 1024,
                disk.bytes
            )
        })
        .collect();
    property("config.hardware.device", "ArrayOfVirtualDevice", &format!("{controller}{disks}"))
}
