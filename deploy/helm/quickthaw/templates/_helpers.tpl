{{- define "quickthaw.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "quickthaw.labels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "quickthaw.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: engine
{{- end -}}

{{- define "quickthaw.activatorSelector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: activator
{{- end -}}

{{- define "quickthaw.planSelector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: plan
{{- end -}}

{{/* Engines and activators, for what applies to both. */}}
{{- define "quickthaw.servers" -}}
matchLabels:
  app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [engine, activator]}
{{- end -}}

{{- define "quickthaw.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "quickthaw.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The settings of each model, by its name: those of `defaults`, and its own above them. A list or a map of resources is replaced whole. */}}
{{- define "quickthaw.models" -}}
{{- $all := dict -}}
{{- if and .Values.activator.enabled (not .Values.activator.image.repository) -}}{{- fail "activator: give image.repository (make image)" -}}{{- end -}}
{{- if not (regexMatch "^[a-z]" (include "quickthaw.fullname" .)) -}}{{- fail "names of Services begin with a letter; give fullnameOverride" -}}{{- end -}}
{{- $ports := list (int .Values.activator.port) (int .Values.admin.port) 9091 -}}
{{- if and .Values.activator.enabled (ne (len (uniq $ports)) 3) -}}{{- fail "activator.port, admin.port and KEDA's, 9091, must differ" -}}{{- end -}}
{{- if and .Values.plan.enabled (not .Values.plan.image.repository) -}}{{- fail "plan: give image.repository (make image)" -}}{{- end -}}
{{- if and .Values.plan.enabled (not .Values.plan.file) -}}{{- fail "plan: give file, the plan as text (docs/capacity.md)" -}}{{- end -}}
{{- range $name, $own := .Values.models -}}
{{- if and $.Values.plan.enabled (has $name (list "plan" "activator-metrics")) -}}{{- fail (printf "models.%s: that is the plan's name; choose another" $name) -}}{{- end -}}
{{- if and $.Values.plan.enabled (mergeOverwrite (deepCopy $.Values.defaults) (deepCopy $own)).autoscaling.enabled -}}{{- fail (printf "models.%s: autoscaling and the plan would both scale it" $name) -}}{{- end -}}
{{- if and $.Values.activator.enabled (has $name (list "activator" "activator-pods")) -}}{{- fail (printf "models.%s: that is the activator's name; choose another" $name) -}}{{- end -}}
{{- $m := mergeOverwrite (deepCopy $.Values.defaults) (deepCopy $own) -}}
{{- range $key := list "resources" "nodeSelector" "affinity" "strategy" -}}
{{- if hasKey $own $key -}}{{- $_ := set $m $key (get $own $key) -}}{{- end -}}
{{- end -}}
{{- if hasKey $own "replicas" -}}{{- $_ := set $m "replicas" $own.replicas -}}{{- end -}}
{{- if not (or $m.model $m.command) -}}{{- fail (printf "models.%s: give model, or the engine's whole command" $name) -}}{{- end -}}
{{- if and $m.model $m.command -}}{{- fail (printf "models.%s: give model or command, not both" $name) -}}{{- end -}}
{{- if not $m.image.repository -}}{{- fail (printf "models.%s: give image.repository (make image)" $name) -}}{{- end -}}
{{- if and (eq $m.snapshot.make "pod") (eq $m.privileges "restore") -}}{{- fail (printf "models.%s: pods with privileges: restore take no snapshot; set snapshot.make: job, or none" $name) -}}{{- end -}}
{{- if and (eq $m.snapshot.make "job") (eq $m.privileges "none") -}}{{- fail (printf "models.%s: pods with privileges: none restore no snapshot; set snapshot.make: none" $name) -}}{{- end -}}
{{- if and (eq $m.snapshot.make "job") (not $m.snapshot.store) -}}{{- fail (printf "models.%s: snapshot.make: job needs snapshot.store, by which pods get the snapshot" $name) -}}{{- end -}}
{{- if and (eq $m.snapshot.make "job") (eq $m.state.type "pvc") -}}{{- fail (printf "models.%s: snapshot.make: job and the pods cannot share state.type: pvc; use hostPath or emptyDir" $name) -}}{{- end -}}
{{- if and $m.warm.enabled (ne $m.state.type "hostPath") -}}{{- fail (printf "models.%s: warm fills the state folder of nodes; it needs state.type: hostPath" $name) -}}{{- end -}}
{{- $asked := and $.Values.activator.enabled (eq $.Values.activator.scaler "keda") -}}
{{- if and $m.autoscaling.enabled (not $m.autoscaling.prometheus) (not $asked) -}}{{- fail (printf "models.%s: autoscaling needs the address of Prometheus, or an activator whose scaler is keda" $name) -}}{{- end -}}
{{- if and $m.autoscaling.enabled $.Values.activator.enabled (not $asked) -}}{{- fail (printf "models.%s: autoscaling and the activator would both scale it; set activator.scaler: keda" $name) -}}{{- end -}}
{{- if and $asked (not $m.autoscaling.enabled) -}}{{- fail (printf "models.%s: activator.scaler is keda, so it needs autoscaling, or nothing scales it" $name) -}}{{- end -}}
{{- if and $m.autoscaling.enabled (not $asked) (eq (int $m.autoscaling.minReplicas) 0) (not $m.autoscaling.moreQuery) -}}{{- fail (printf "models.%s: at minReplicas: 0 nothing would wake it; give autoscaling.moreQuery, or use the activator" $name) -}}{{- end -}}
{{- if gt (int $m.autoscaling.minReplicas) (int $m.autoscaling.maxReplicas) -}}{{- fail (printf "models.%s: autoscaling.minReplicas is above maxReplicas" $name) -}}{{- end -}}
{{- if eq (int $m.port) (int $.Values.admin.port) -}}{{- fail (printf "models.%s: port and admin.port are the same" $name) -}}{{- end -}}
{{- $scaled := or $m.autoscaling.enabled $.Values.activator.enabled $.Values.plan.enabled -}}
{{- if and $scaled (ne (toString $m.replicas) "<nil>") (ne (int $m.replicas) (int $.Values.defaults.replicas)) -}}{{- fail (printf "models.%s: its replicas are scaled; leave replicas out" $name) -}}{{- end -}}
{{- if $scaled -}}{{- $_ := set $m "replicas" nil -}}{{- end -}}
{{- if and (eq $m.state.type "pvc") (or $m.autoscaling.enabled (gt (int $m.replicas) 1)) -}}{{- fail (printf "models.%s: state.type: pvc is of one pod at a time; use hostPath for more" $name) -}}{{- end -}}
{{- $_ := set $all $name $m -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Below: a dict with `root`, `name` and `m`, the model's settings. */}}
{{- define "quickthaw.modelName" -}}
{{- printf "%s-%s" (include "quickthaw.fullname" .root) .name -}}
{{- end -}}

{{- define "quickthaw.modelSelector" -}}
{{ include "quickthaw.selector" .root }}
quickthaw.dev/model: {{ .name | quote }}
{{- end -}}

{{- define "quickthaw.modelLabels" -}}
{{ include "quickthaw.labels" .root }}
app.kubernetes.io/component: engine
quickthaw.dev/model: {{ .name | quote }}
{{- end -}}

{{- define "quickthaw.image" -}}
{{- if .m.image.digest -}}
{{- printf "%s@%s" .m.image.repository .m.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .m.image.repository (default "latest" .m.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "quickthaw.program" -}}
{{- if .m.quickthawImage -}}/quickthaw/bin{{- else -}}/opt/quickthaw/bin{{- end -}}
{{- end -}}

{{/* The engine's words behind `quickthaw launch`, `quickthaw snapshot create` and `pull-snapshot` alike: they select one snapshot. */}}
{{- define "quickthaw.engineWords" -}}
{{- $listen := list "--host" "0.0.0.0" "--port" (toString (int .m.port)) -}}
{{- if .m.command -}}
{{- toYaml (concat (list "--") .m.command $listen) -}}
{{- else -}}
{{- toYaml (concat (list .m.engine (ternary "--model-path" "--model" (eq .m.engine "sglang")) .m.model) .m.args $listen) -}}
{{- end -}}
{{- end -}}

{{/* A value of `options` as a word. helm reads numbers as floats, and writes those from a million on as 1e+06. */}}
{{- define "quickthaw.word" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{- printf "%.0f" . -}}{{- else -}}{{- toString . -}}{{- end -}}
{{- end -}}

{{- define "quickthaw.env" -}}
- name: QUICKTHAW_HOME
  value: /var/lib/quickthaw
- name: QUICKTHAW_ADMIN_LISTEN
  value: ":{{ int .root.Values.admin.port }}"
{{- if ne .m.modelCache.type "none" }}
{{- $own := false }}
{{- range .m.env }}{{ if eq .name "HF_HOME" }}{{ $own = true }}{{ end }}{{ end }}
{{- if not $own }}
- name: HF_HOME
  value: /var/cache/huggingface
{{- end }}
{{- end }}
{{- with .root.Values.admin.tokenSecret }}
{{- if .name }}
- name: QUICKTHAW_ADMIN_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .name | quote }}, key: {{ .key | quote }}}}
{{- end }}
{{- end }}
{{- if .m.snapshot.store }}
- name: QUICKTHAW_SNAPSHOT_STORE
  value: {{ .m.snapshot.store | quote }}
{{- end }}
{{- if ne .m.snapshot.make "pod" }}
- name: QUICKTHAW_SNAPSHOT
  value: "0"
{{- end }}
{{- if not (or .m.fuseResource (hasKey .m.options "mount")) }}
- name: QUICKTHAW_MOUNT
  value: "0"
{{- end }}
{{- if not (hasKey .m.options "start-timeout") }}
- name: QUICKTHAW_START_TIMEOUT
  value: "{{ int .m.startTimeoutSeconds }}s"
{{- end }}
{{- range $key, $value := .m.options }}
- name: QUICKTHAW_{{ $key | upper | replace "-" "_" }}
  value: {{ include "quickthaw.word" $value | quote }}
{{- end }}
{{- end -}}

{{- define "quickthaw.resources" -}}
{{- $r := deepCopy .m.resources -}}
{{- if and .m.fuseResource (ne .m.privileges "none") -}}
{{- $_ := set $r "limits" (merge (dict .m.fuseResource 1) (default dict $r.limits)) -}}
{{- end -}}
{{- toYaml $r -}}
{{- end -}}

{{- define "quickthaw.mounts" -}}
- name: state
  mountPath: /var/lib/quickthaw
{{- if ne .m.modelCache.type "none" }}
- name: model-cache
  mountPath: /var/cache/huggingface
{{- end }}
{{- if .m.quickthawImage }}
- name: quickthaw
  mountPath: /quickthaw
{{- end }}
{{- with .m.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quickthaw.volume" -}}
{{- if eq .of.type "hostPath" -}}
hostPath: {path: {{ .of.path | quote }}, type: DirectoryOrCreate}
{{- else if eq .of.type "pvc" -}}
persistentVolumeClaim: {claimName: {{ default .claim .of.existingClaim | quote }}}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}

{{/* What a process without any privilege gets: init containers, the test. */}}
{{- define "quickthaw.plainSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* `privileges`: those of docs/deploy.md. */}}
{{- define "quickthaw.security" -}}
{{- if eq .privileges "none" -}}
{{ include "quickthaw.plainSecurity" . }}
{{- else -}}
runAsUser: 0
capabilities: {drop: [ALL], add: [SYS_ADMIN, NET_ADMIN, SYS_PTRACE, SETPCAP, SYS_CHROOT]}
appArmorProfile: {type: Unconfined}
{{- if eq .privileges "restore" }}
seccompProfile: {type: Localhost, localhostProfile: {{ .m.seccompProfile | quote }}}
{{- else }}
seccompProfile: {type: Unconfined}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Everything of a pod but its main container; `privileges` are that container's. */}}
{{- define "quickthaw.podSpec" -}}
serviceAccountName: {{ include "quickthaw.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
{{ toYaml . }}
{{- end }}
{{- if .m.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with index $.m $key }}
{{ $key }}:
{{- if kindIs "string" . }} {{ . | quote }}{{ else }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- end }}
{{- end }}
{{- $pulls := and .m.snapshot.store .m.snapshot.pull (ne .m.privileges "none") }}
{{- if or .m.quickthawImage $pulls }}
initContainers:
{{- if .m.quickthawImage }}
  - name: quickthaw
    image: {{ .m.quickthawImage | quote }}
    imagePullPolicy: {{ .m.image.pullPolicy }}
    command: [/opt/quickthaw/bin/copy-into, /quickthaw]
    securityContext:
      runAsUser: 0
{{ include "quickthaw.plainSecurity" . | indent 6 }}
    volumeMounts:
      - {name: quickthaw, mountPath: /quickthaw}
{{- end }}
{{- if $pulls }}
  - name: pull-snapshot
    image: {{ include "quickthaw.image" . | quote }}
    imagePullPolicy: {{ .m.image.pullPolicy }}
    command: [{{ include "quickthaw.program" . }}/pull-snapshot]
    args:
{{ include "quickthaw.engineWords" . | indent 6 }}
    env:
{{ include "quickthaw.env" . | indent 6 }}
{{- with .m.env }}
{{ toYaml . | indent 6 }}
{{- end }}
{{- with .m.envFrom }}
    envFrom:
{{ toYaml . | indent 6 }}
{{- end }}
    resources:
{{ include "quickthaw.resources" . | indent 6 }}
    securityContext:
      runAsUser: 0
{{ include "quickthaw.plainSecurity" . | indent 6 }}
    volumeMounts:
{{ include "quickthaw.mounts" . | indent 6 }}
{{- end }}
{{- end }}
volumes:
  - name: state
{{ include "quickthaw.volume" (dict "of" .m.state "claim" (printf "%s-state" (include "quickthaw.modelName" .))) | indent 4 }}
{{- if ne .m.modelCache.type "none" }}
  - name: model-cache
{{ include "quickthaw.volume" (dict "of" .m.modelCache "claim" (printf "%s-models" (include "quickthaw.modelName" .))) | indent 4 }}
{{- end }}
{{- if .m.quickthawImage }}
  - name: quickthaw
    emptyDir: {sizeLimit: 1Gi}
{{- end }}
{{- with .m.volumes }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}
