{{- define "tunesmith.labels" -}}
app.kubernetes.io/name: tunesmith
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tunesmith.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{- define "tunesmith.databaseSecret" -}}
{{ .Values.postgresql.urlSecret | default (printf "%s-database" .Release.Name) }}
{{- end }}
