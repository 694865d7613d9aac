# What the agent asks of Hyper-V: one question, in $asked, and one JSON document for an answer. Classes, methods and numbers are those of
# root\virtualization\v2 as Microsoft documents them.
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
[Console]::OutputEncoding = New-Object System.Text.UTF8Encoding $false
$namespace = 'root\virtualization\v2'

function Get-One($class, $filter) {
    if ($filter) {
        @(Get-WmiObject -Namespace $namespace -Class $class -Filter $filter)[0]
    } else {
        @(Get-WmiObject -Namespace $namespace -Class $class)[0]
    }
}

# A value between quotes of WQL.
function Get-Quoted($text) {
    "'" + ($text -replace '\\', '\\' -replace "'", "\'") + "'"
}

function Get-Related($object, $class, $association) {
    @($object.GetRelated($class, $association, $null, $null, $null, $null, $false, $null) | ForEach-Object { $_ })
}

# Waits for what was begun. A job that is not new (2), starting (3) or running (4) is over, and 7 is well.
function Complete-Job($begun) {
    if ($begun.ReturnValue -eq 0) { return $null }
    if ($begun.ReturnValue -ne 4096) { throw "return value $($begun.ReturnValue)" }
    $job = [wmi]$begun.Job
    while ($job.JobState -in 2, 3, 4) {
        Start-Sleep -Milliseconds 100
        $job.PSBase.Get()
    }
    if ($job.JobState -ne 7) { throw "$($job.ErrorDescription) (job state $($job.JobState), error code $($job.ErrorCode))" }
    $job
}

# The files of the disks in some settings. Pass-through disks have none.
function Get-Files($settings) {
    $disks = Get-Related $settings 'Msvm_StorageAllocationSettingData' 'Msvm_VirtualSystemSettingDataComponent'
    @($disks | Where-Object { $_.ResourceSubType -eq 'Microsoft:Hyper-V:Virtual Hard Disk' } | ForEach-Object { [string]$_.HostResource[0] })
}

function Get-Disk($file) {
    $images = Get-One 'Msvm_ImageManagementService' $null
    $answer = $images.GetVirtualHardDiskSettingData($file)
    Complete-Job $answer | Out-Null
    if (-not $answer.SettingData) { throw "nothing is told of $file" }
    $values = @{}
    ([xml]$answer.SettingData).INSTANCE.PROPERTY | ForEach-Object { $values[$_.NAME] = [string]$_.VALUE }
    @{ path = $file; bytes = [uint64]$values['MaxInternalSize']; parent = $(if ($values['ParentPath']) { $values['ParentPath'] } else { $null }) }
}

function Get-Checkpoint($settings) {
    @{
        id = [string]$settings.InstanceID
        name = [string]$settings.ElementName
        is_recovery = $settings.VirtualSystemType -eq 'Microsoft:Hyper-V:Snapshot:Recovery'
        disks = @(Get-Files $settings)
    }
}

function Get-Point($point) {
    @{ id = [string]$point.InstanceID; change_ids = @($point.ResilientChangeTrackingIdentifiers | ForEach-Object { [string]$_ }) }
}

function Get-System($id) {
    Get-One 'Msvm_ComputerSystem' "Name = $(Get-Quoted $id)"
}

function Get-Machine($system) {
    $settings = @(Get-Related $system 'Msvm_VirtualSystemSettingData' 'Msvm_SettingsDefineState')[0]
    $checkpoints = Get-Related $system 'Msvm_VirtualSystemSettingData' 'Msvm_SnapshotOfVirtualSystem'
    $points = Get-Related $system 'Msvm_VirtualSystemReferencePoint' 'Msvm_ReferencePointOfVirtualSystem'
    @{
        id = [string]$system.Name
        name = [string]$system.ElementName
        is_off = $system.EnabledState -eq 3
        disks = @(Get-Files $settings | ForEach-Object { Get-Disk $_ })
        checkpoints = @($checkpoints | ForEach-Object { Get-Checkpoint $_ })
        reference_points = @($points | ForEach-Object { Get-Point $_ })
    }
}

# The machine whose settings, or those of one of its checkpoints, name the file.
function Find-Machine($file) {
    $kind = "ResourceSubType = 'Microsoft:Hyper-V:Virtual Hard Disk'"
    foreach ($disk in @(Get-WmiObject -Namespace $namespace -Class 'Msvm_StorageAllocationSettingData' -Filter $kind)) {
        if (-not $disk.HostResource -or $disk.HostResource[0] -ne $file) { continue }
        foreach ($settings in @($disk.GetRelated('Msvm_VirtualSystemSettingData'))) {
            $system = Get-System $settings.VirtualSystemIdentifier
            if ($system) { return Get-Machine $system }
        }
    }
    $null
}

function New-Checkpoint($id, $quiet) {
    $settings = ([wmiclass]"\\.\${namespace}:Msvm_VirtualSystemSnapshotSettingData").CreateInstance()
    $settings.ConsistencyLevel = $(if ($quiet) { 1 } else { 2 })
    $settings.IgnoreNonSnapshottableDisks = $true
    $service = Get-One 'Msvm_VirtualSystemSnapshotService' $null
    $begun = $service.CreateSnapshot((Get-System $id), $settings.GetText(2), 32768)
    $job = Complete-Job $begun
    if (-not $job) { throw 'it names no checkpoint' }
    Get-Checkpoint @($job.GetRelated('Msvm_VirtualSystemSettingData'))[0]
}

function Convert-Checkpoint($id) {
    $settings = Get-One 'Msvm_VirtualSystemSettingData' "InstanceID = $(Get-Quoted $id)"
    if (-not $settings) { throw 'it is not there' }
    $service = Get-One 'Msvm_VirtualSystemSnapshotService' $null
    $job = Complete-Job $service.ConvertToReferencePoint($settings)
    if (-not $job) { throw 'it names no reference point' }
    Get-Point @($job.GetRelated('Msvm_VirtualSystemReferencePoint'))[0]
}

function Remove-Point($id) {
    $point = Get-One 'Msvm_VirtualSystemReferencePoint' "InstanceID = $(Get-Quoted $id)"
    if ($point) {
        $service = Get-One 'Msvm_VirtualSystemReferencePointService' $null
        Complete-Job $service.DestroyReferencePoint($point) | Out-Null
    }
    $null
}

try {
    $answer = switch ($asked.question) {
        'find' { Find-Machine $asked.about }
        'look' { $system = Get-System $asked.about; if ($system) { Get-Machine $system } else { $null } }
        'checkpoint' { New-Checkpoint $asked.about $asked.quiet }
        'convert' { Convert-Checkpoint $asked.about }
        'remove' { Remove-Point $asked.about }
    }
    $told = @{ answer = $answer }
} catch [System.Management.ManagementException] {
    # No such namespace (0x8004100E) or class (0x80041010): there is no Hyper-V here.
    $code = [string]$_.Exception.ErrorCode
    $told = @{ error = "$($_.Exception.Message)"; is_absent = $code -in 'InvalidNamespace', 'InvalidClass' }
} catch {
    $told = @{ error = "$($_.Exception.Message)"; is_absent = $false }
}
ConvertTo-Json -InputObject $told -Compress -Depth 8
